"""The largest logits of every row and its log-sum-exps, in one pass: what a teacher's sparse distribution is made of.

Legend: n rows, v columns of this rank's vocabulary shard, k largest, t temperatures.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fuse_kernels.arguments import Student, make_shard, unfit_for_triton
from fuse_kernels.rows import VocabularyShard

MOST_LARGEST = 64  # that the Triton kernel keeps of a row

# Logits treated at once: on a CPU what stays in its cache (2.7 times faster than 2**25), on a GPU what keeps it busy.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**26
# Columns of which only the largest is compared at first: the k largest logits lie in the k blocks with the largest maxima.
_BLOCK = 128


class TopK(NamedTuple):
    """Of every row; the same on every rank of a group."""

    ids: Tensor  # [n, k] int64, global, by falling logit, equal logits by rising id; -1 where the vocabulary has fewer
    logits: Tensor  # [n, k] fp32; -inf where ids is -1
    relative_lse: (
        Tensor  # [n, t] fp32: log sum_v exp((z_v - the largest z) / T), not finite where a logit is NaN or +inf
    )
    label_logits: Tensor | None  # [n] fp32


def topk_logsumexp(
    logits: Tensor,
    k: int,
    temperatures: Sequence[float],
    *,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
) -> TopK:
    """The k largest logits of each row, its log-sum-exp at every temperature, and the logit of its label.

    logits [n, v], any floating-point type, not changed: this rank's vocabulary shard, columns vocab_start ... vocab_start + v - 1.
    labels [n] global ids; vocab_size and group as in `sparse_kl_cross_entropy`. Everything is relative to the row's largest
    logit: log p_T(id) = (logit - logits[:, 0]) / T - relative_lse, which keeps its digits however large the logits are.
    implementation: "triton" (CUDA; k at most 64, no fp64), "torch" (any device), "auto" (triton where it can, else torch).

    Equal logits rank by id, so that a row's entries depend on its logits alone, not on the device, the rows beside it or the shards.

    Collectives: one all-gather of 2 k + t + 1 numbers per row under a group, of k candidates from every rank. Memory: outputs, and
    in "torch" one scratch of 4 MB (CPU) or 256 MB (GPU).

    Raises ValueError, naming the argument, where shapes or values do not fit, or "triton" is asked for where it cannot run.
    """
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits is {list(logits.shape)} {logits.dtype}: it must be [n, v] and floating point")
    if k < 1:
        raise ValueError(f"k is {k}: it must be at least 1")
    if not temperatures or not all(math.isfinite(t) and t > 0 for t in temperatures):
        raise ValueError(f"temperatures is {list(temperatures)}: it must hold finite numbers above 0")
    if labels is not None and (labels.shape != logits.shape[:1] or labels.device != logits.device):
        raise ValueError(
            f"labels is {list(labels.shape)} on {labels.device}: logits need [{len(logits)}] on {logits.device}"
        )
    shard = make_shard(logits.shape[1], vocab_size, vocab_start, group)
    temperatures = [float(t) for t in temperatures]
    if _choose(implementation, logits, k) == "triton":
        from fuse_kernels.triton_topk import triton_topk

        found = triton_topk(logits, k, temperatures, labels, shard)
    else:
        found = _torch_topk(logits, k, temperatures, labels, shard)
    return found if shard.group is None else _merged(found, k, temperatures, shard.group)


def _choose(implementation: str, logits: Tensor, k: int) -> str:
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f"implementation is {implementation!r}: use one of auto, triton, torch")
    if implementation == "torch" or (implementation == "auto" and logits.device.type != "cuda"):
        return "torch"
    reason = unfit_for_triton(Student("logits", logits.shape[0], logits.shape[1], logits.dtype, logits.device))
    if k > MOST_LARGEST:
        reason = f"k is {k}, the kernel keeps {MOST_LARGEST}"
    if reason and implementation == "triton":
        raise ValueError(f'implementation="triton": {reason}: use "auto" or "torch"')
    return "torch" if reason else "triton"


def _merged(found: TopK, k: int, temperatures: Sequence[float], group: dist.ProcessGroup) -> TopK:
    """Of all shards, from what each has found: one all-gather."""
    label_logits = found.label_logits
    numbers = [found.logits, found.relative_lse, *([] if label_logits is None else [label_logits[:, None]])]
    # Ids travel as the bits of floats: one tensor, one collective.
    mine = torch.cat((found.ids.int().view(torch.float32), *numbers), 1).contiguous()
    everyone = mine.new_empty((dist.get_world_size(group), *mine.shape))
    dist.all_gather_into_tensor(everyone.view(-1, mine.shape[1]), mine, group=group)
    ids, logits, lse, labels = everyone.split([k, k, len(temperatures), mine.shape[1] - 2 * k - len(temperatures)], 2)
    candidates = logits.transpose(0, 1).flatten(1)
    candidate_ids = ids.contiguous().view(torch.int32).long().transpose(0, 1).flatten(1)
    # A slot without an id ranks below every logit, be that -inf.
    keys = _rank_keys(candidates, candidate_ids).where(candidate_ids >= 0, torch.iinfo(torch.int64).min)
    chosen = keys.topk(k, 1).indices
    largest = candidates.gather(1, chosen)
    inverse = 1 / torch.tensor(temperatures, dtype=torch.float32, device=mine.device)
    shift = (logits[:, :, :1] - largest[:, :1]).nan_to_num(nan=-torch.inf)  # a shard of -inf alone, or without columns
    merged = (lse + shift * inverse).logsumexp(0)
    return TopK(
        candidate_ids.gather(1, chosen), largest, merged, None if label_logits is None else labels[:, :, 0].sum(0)
    )


def _torch_topk(
    logits: Tensor, k: int, temperatures: Sequence[float], labels: Tensor | None, shard: VocabularyShard
) -> TopK:
    """Of this shard. Label logits are 0 where the label lies in another."""
    n, device = len(logits), logits.device
    found = TopK(
        torch.full((n, k), -1, device=device),
        torch.full((n, k), -torch.inf, device=device),
        torch.full((n, len(temperatures)), -torch.inf, device=device),
        None if labels is None else torch.zeros(n, device=device),
    )
    if shard.columns == 0:
        return found
    here = min(k, shard.columns)
    width = -(-shard.columns // _BLOCK) * _BLOCK
    size = min(max((_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) // width, 1), max(n, 1))
    scratch = torch.empty(size, width, dtype=torch.float32, device=device)
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        values = scratch[: rows.stop - first]
        values[:, : shard.columns] = logits[rows, : shard.columns]
        values[:, shard.columns :] = -torch.inf
        if labels is not None and found.label_logits is not None:
            column = labels[rows] - shard.start
            inside = (column >= 0) & (column < shard.columns)
            label_logits = values.gather(1, column.where(inside, 0)[:, None])[:, 0]
            found.label_logits[rows] = label_logits.where(inside, 0.0)
        largest, columns = _largest(values, here)
        found.ids[rows, :here] = columns + shard.start
        found.logits[rows, :here] = largest
        # -inf cannot be subtracted from -inf: a row of nothing else keeps its sum of 0.
        top = largest[:, :1]
        found.relative_lse[rows] = _logsumexps(values.sub_(top.where(top != -torch.inf, 0.0)), temperatures)
    return found


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of values [n, a multiple of _BLOCK], falling, and their columns: (float32 [n, k], int64 [n, k]).

    Blocks are ranked by (maximum, lower number) and columns by (value, lower number). If a column among the first k lay in no
    block among the first k, each of those would hold a column that ranks before it.
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
    """int64 keys, all different, that order as (value, lower number first): the bits of a float, read as a whole number, order as
    the float does, those of a negative one the other way round."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 equals 0.0
    return ((bits ^ ((bits >> 63) & 0x7FFFFFFF)) << 32) - numbers


def _logsumexps(relative: Tensor, temperatures: Sequence[float]) -> Tensor:
    """float32 [n, t] of logits [n, width] relative to the largest; may overwrite them.

    The exponential is what costs: one serves T = 2 and T = 1 together, for exp(r / 2)^2 = exp(r).
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
