"""The largest logits and the log-sum-exps of every row, in one pass.

A teacher's sparse distribution is made of these.

Legend: n rows, v columns of this rank's vocabulary shard, k largest, t temperatures.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fuse_kernels.arguments import Student, check_softcap, make_shard, unfit_for_triton
from fuse_kernels.rows import VocabularyShard
from fuse_kernels.softcap import cap_

MOST_LARGEST = 64  # that the Triton kernel keeps of a row

# Logits in one chunk. On a CPU a chunk must stay in the cache (2.7 times faster than 2**25), on a GPU it must
# keep the device busy.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**26
# Columns of a block. At first only the maxima of the blocks are compared: the k largest logits lie in the k
# blocks with the largest maxima.
_BLOCK = 128


class TopK(NamedTuple):
    """The results of all rows. They are the same on every rank of a group."""

    # [n, k] int64, global ids by falling logit, equal logits by rising id; -1 if the vocabulary has fewer
    # than k columns
    ids: Tensor
    logits: Tensor  # [n, k] fp32; -inf if ids is -1
    # [n, t] fp32: log sum_v exp((z_v - the largest z) / T); not finite if a logit of the row is NaN or +inf
    relative_lse: Tensor
    label_logits: Tensor | None  # [n] fp32


def topk_logsumexp(
    logits: Tensor,
    k: int,
    temperatures: Sequence[float],
    *,
    labels: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
) -> TopK:
    """The k largest logits of each row, its log-sum-exp at every temperature, and the logit of its label.

    logits [n, v], any floating-point type, not changed: this rank's vocabulary shard, columns vocab_start ...
        vocab_start + v - 1.
    labels [n]: global ids. None: no label logits.
    softcap: as in `sparse_kl_cross_entropy`. All results are of the capped logits.
    vocab_size, group: as in `sparse_kl_cross_entropy`.
    implementation: "triton" (CUDA; k at most 64, no fp64), "torch" (any device), "auto" (triton if it can
        run, else torch).

    The log-sum-exps are relative to the row's largest logit: log p_T(id) = (logit - logits[:, 0]) / T -
    relative_lse. This keeps its digits however large the logits are. Equal logits rank by id, so that a row's
    entries depend on its logits alone, not on the device, the neighbouring rows or the shards. With a softcap
    the last digits of a capped logit are the device's, so that another device may rank logits that are equal
    but for those digits in another order.

    Collectives: under a group one all-gather of 2 k + t + 1 numbers per row and rank (k candidates, and the
    label's logit). Memory: the outputs, and in "torch" one scratch buffer of 4 MB (CPU) or 256 MB (GPU).

    Raises ValueError, which names the argument, if shapes or values do not fit,
    or if "triton" is given and cannot run.
    """
    local, shard = _of_this_shard(
        logits, k, temperatures, labels, softcap, vocab_size, vocab_start, group, implementation
    )
    if shard.group is None:
        return local
    packed = _packed(local)
    all_shards = packed.new_empty((dist.get_world_size(group), *packed.shape))
    dist.all_gather_into_tensor(all_shards.view(-1, packed.shape[1]), packed, group=group)
    return _merged(all_shards, k, temperatures)


def gather_topk_logsumexp(
    logits: Tensor,
    k: int,
    temperatures: Sequence[float],
    *,
    labels: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
) -> TopK | None:
    """`topk_logsumexp` for a result that one rank stores: the first rank of the group gets it, the others
    None.

    Collectives: under a group one gather. Every rank but the first sends 2 k + t + 1 numbers per row, which
    is less than an all-gather by a factor of the group's size.
    """
    local, shard = _of_this_shard(
        logits, k, temperatures, labels, softcap, vocab_size, vocab_start, group, implementation
    )
    if shard.group is None:
        return local
    packed = _packed(local)
    root = dist.get_global_rank(shard.group, 0)
    if dist.get_rank() != root:
        dist.gather(packed, dst=root, group=group)
        return None
    all_shards = packed.new_empty((dist.get_world_size(group), *packed.shape))
    dist.gather(packed, list(all_shards), dst=root, group=group)
    return _merged(all_shards, k, temperatures)


def _of_this_shard(
    logits: Tensor,
    k: int,
    temperatures: Sequence[float],
    labels: Tensor | None,
    softcap: float | None,
    vocab_size: int | None,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    implementation: str,
) -> tuple[TopK, VocabularyShard]:
    """The TopK of this rank's columns, and which columns these are.

    Raises ValueError as `topk_logsumexp` says.
    """
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits is {list(logits.shape)} {logits.dtype}, but must be [n, v] and floating point"
        )
    if k < 1:
        raise ValueError(f"k is {k}, but must be at least 1")
    if not temperatures or not all(math.isfinite(t) and t > 0 for t in temperatures):
        raise ValueError(f"temperatures is {list(temperatures)}, but must hold finite numbers above 0")
    if labels is not None and (labels.shape != logits.shape[:1] or labels.device != logits.device):
        raise ValueError(
            f"labels is {list(labels.shape)} on {labels.device}, but logits need [{len(logits)}] on "
            f"{logits.device}"
        )
    softcap = check_softcap(softcap)
    shard = make_shard(logits.shape[1], vocab_size, vocab_start, group)
    temperatures = [float(t) for t in temperatures]
    if _choose(implementation, logits, k) == "triton":
        from fuse_kernels.triton_topk import triton_topk

        return triton_topk(logits, k, temperatures, labels, softcap, shard), shard
    return _torch_topk(logits, k, temperatures, labels, softcap, shard), shard


def _choose(implementation: str, logits: Tensor, k: int) -> str:
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f"implementation is {implementation!r}. Use one of auto, triton, torch.")
    if implementation == "torch" or (implementation == "auto" and logits.device.type != "cuda"):
        return "torch"
    reason = unfit_for_triton(
        Student("logits", logits.shape[0], logits.shape[1], logits.dtype, logits.device)
    )
    if k > MOST_LARGEST:
        reason = f"k is {k}, but the kernel keeps at most {MOST_LARGEST}"
    if reason and implementation == "triton":
        raise ValueError(f'implementation="triton" cannot run: {reason}. Use "auto" or "torch".')
    return "torch" if reason else "triton"


def _packed(local: TopK) -> Tensor:
    """float32 [n, 2 k + t + 1 (with labels)]: a shard's TopK as one tensor, for one collective."""
    label_logits = local.label_logits
    numbers = [local.logits, local.relative_lse, *([] if label_logits is None else [label_logits[:, None]])]
    # Ids travel as the bits of floats.
    return torch.cat((local.ids.int().view(torch.float32), *numbers), 1).contiguous()


def _merged(all_shards: Tensor, k: int, temperatures: Sequence[float]) -> TopK:
    """The TopK of the whole vocabulary. all_shards [ranks, n, ...]: _packed of every shard."""
    label_columns = all_shards.shape[2] - 2 * k - len(temperatures)
    ids, logits, lse, labels = all_shards.split([k, k, len(temperatures), label_columns], 2)
    candidates = logits.transpose(0, 1).flatten(1)
    candidate_ids = ids.contiguous().view(torch.int32).long().transpose(0, 1).flatten(1)
    # A slot without an id ranks below every logit, even below -inf.
    keys = _rank_keys(candidates, candidate_ids).where(candidate_ids >= 0, torch.iinfo(torch.int64).min)
    chosen = keys.topk(k, 1).indices
    largest = candidates.gather(1, chosen)
    # Each shard's sum is relative to its own largest logit m: log sum exp((z - M) / T) = lse + (m - M) / T,
    # with M the largest of all shards. If a shard holds only -inf, or no column, m - M is NaN or -inf and the
    # shard adds nothing.
    inverse = 1 / torch.tensor(temperatures, dtype=torch.float32, device=all_shards.device)
    shift = (logits[:, :, :1] - largest[:, :1]).nan_to_num(nan=-torch.inf)
    merged = (lse + shift * inverse).logsumexp(0)
    return TopK(
        candidate_ids.gather(1, chosen),
        largest,
        merged,
        labels[:, :, 0].sum(0) if label_columns else None,
    )


def _torch_topk(
    logits: Tensor,
    k: int,
    temperatures: Sequence[float],
    labels: Tensor | None,
    softcap: float | None,
    shard: VocabularyShard,
) -> TopK:
    """The TopK of this shard. A label in another shard has the label logit 0."""
    n, device = len(logits), logits.device
    results = TopK(
        torch.full((n, k), -1, device=device),
        torch.full((n, k), -torch.inf, device=device),
        torch.full((n, len(temperatures)), -torch.inf, device=device),
        None if labels is None else torch.zeros(n, device=device),
    )
    if shard.columns == 0:
        return results
    here = min(k, shard.columns)
    # The scratch rows are padded with -inf to whole blocks.
    width = -(-shard.columns // _BLOCK) * _BLOCK
    size = min(max((_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) // width, 1), max(n, 1))
    scratch = torch.empty(size, width, dtype=torch.float32, device=device)
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        values = scratch[: rows.stop - first]
        values[:, : shard.columns] = logits[rows, : shard.columns]
        values[:, shard.columns :] = -torch.inf
        if softcap is not None:
            cap_(values, softcap)
        if labels is not None and results.label_logits is not None:
            column = labels[rows] - shard.start
            inside = (column >= 0) & (column < shard.columns)
            label_logits = values.gather(1, column.where(inside, 0)[:, None])[:, 0]
            results.label_logits[rows] = label_logits.where(inside, 0.0)
        largest, columns = _largest(values, here)
        results.ids[rows, :here] = columns + shard.start
        results.logits[rows, :here] = largest
        # (-inf) - (-inf) would be NaN. A row that holds only -inf is shifted by 0 and keeps its sum of 0.
        top = largest[:, :1]
        results.relative_lse[rows] = _logsumexps(values.sub_(top.where(top != -torch.inf, 0.0)), temperatures)
    return results


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of values [n, a multiple of _BLOCK], falling, and their columns:
    (float32 [n, k], int64 [n, k]).

    Blocks are ranked by (maximum, lower number) and columns by (value, lower number). The k best columns lie
    in the k best blocks: if one of them lay in another block, each of the k best blocks would hold a column
    that ranks before it.
    """
    blocks = values.view(len(values), values.shape[1] // _BLOCK, _BLOCK)
    maxima = blocks.amax(2)
    numbers = torch.arange(blocks.shape[1], device=values.device)
    best = _rank_keys(maxima, numbers).topk(min(k, blocks.shape[1]), 1).indices[:, :, None]
    candidates = blocks.gather(1, best.expand(-1, -1, _BLOCK)).flatten(1)
    columns = (best * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    chosen = _rank_keys(candidates, columns).topk(k, 1).indices
    return candidates.gather(1, chosen), columns.gather(1, chosen)


def _rank_keys(values: Tensor, numbers: Tensor) -> Tensor:
    """int64 keys, all different, that order as (value, then the lower number first).

    The bits of a positive float, read as an integer, order as the float does. Those of a negative float order
    the other way round, so that all bits but the sign are inverted.
    """
    bits = (values + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 equals 0.0
    return ((bits ^ ((bits >> 63) & 0x7FFFFFFF)) << 32) - numbers


def _logsumexps(relative: Tensor, temperatures: Sequence[float]) -> Tensor:
    """float32 [n, t]: the log-sum-exps of `relative` [n, width], the logits minus the row's largest.

    May overwrite `relative`.

    The exponentials take most of the time.
    One exponential serves both T = 2 and T = 1, as exp(r / 2)^2 = exp(r).
    """
    distinct = set(temperatures)
    sums = {}
    if distinct == {1.0, 2.0}:
        exponentials = relative.div_(2.0).exp_()
        sums[2.0] = exponentials.sum(1)
        sums[1.0] = exponentials.square_().sum(1)
    else:
        for temperature in sorted(distinct):
            sums[temperature] = (relative / temperature).exp_().sum(1)
    return torch.stack([sums[temperature] for temperature in temperatures], 1).log_()
