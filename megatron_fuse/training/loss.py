"""The forward step that Megatron's pipeline schedules call, and what becomes of its losses.

Megatron divides a loss by the number of micro-batches, which is undone here, and its data parallelism averages gradients over the
ranks, which is undone in the weights of the tokens (batches.py). So the upstream gradient of every token's loss is exactly 1, and the
loss kernels need not multiply by it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_fuse.model.attention import PackedDocuments
from megatron_fuse.recipe import MODES
from megatron_fuse.training.batches import MicroBatch

ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, Callable]]

# How student and teacher fit each other, after the losses in the model's output and in its order (fuse_kernels.TokenLosses).
FIT = ("teacher mass", "student mass", "agreement")


def make_forward_step(*, micro_batches: int, sources: int) -> ForwardStep:
    """forward_step(data_iterator, model) for get_forward_backward_func. Its reports are for reduce_report. sources: how many there
    are."""

    def forward_step(data_iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = next(data_iterator)
        packed = _packed_seq_params(batch)
        output = model(batch.tokens, batch.position_ids, None, labels=batch.targets, packed_seq_params=packed)

        def loss_function(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """losses [6, b, s] in the order of fuse_kernels.TokenLosses."""
            loss = losses[0].sum()
            # Megatron's division leaves a gradient of 1 / micro_batches, rounded. Divided by that same rounded number it is 1;
            # multiplied by micro_batches it would miss 1 by a rounding. A loss that is not finite gets such a gradient, by
            # whose norm all ranks know that the step is to be skipped: the logit -inf of a label would leave a finite one.
            inverse = torch.full_like(loss.detach(), 1 / micro_batches)
            scaled = loss / inverse.where(loss.detach().isfinite(), math.nan)
            return scaled, {"sums": _sums(losses.detach(), batch, sources)}

        return output, loss_function

    return forward_step


def _sums(losses: Tensor, batch: MicroBatch, sources: int) -> Tensor:
    """[1 + modes x 2 + modes x 4 x sources] of losses [6, b, s]: the loss; CE and KL by mode; by mode and source the number of
    tokens with a teacher and FIT."""
    _, ce, kl, teacher_mass, *_ = losses
    of_mode = _one_hot(batch.mode, len(MODES), losses.dtype)  # [b, modes]
    of_source = _one_hot(batch.sources_by_position(), sources, losses.dtype)  # [b, s, sources]
    taught = (teacher_mass > 0).to(losses.dtype)  # what a teacher's stored entries hold is never 0
    fit = torch.stack([taught, *losses[3:]], dim=1) @ of_source  # [b, 4, sources]
    by_mode = torch.stack([ce, kl], dim=1).sum(dim=2)  # [b, 2]
    sums = [losses[0].sum()[None], of_mode.t() @ by_mode, of_mode.t() @ fit.flatten(1)]
    return torch.cat([of.flatten() for of in sums])


def _one_hot(places: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[*, size]; a place of -1 has no 1."""
    return (places[..., None] == torch.arange(size, device=places.device)).to(dtype)


def _packed_seq_params(batch: MicroBatch) -> PackedDocuments | None:
    """The documents' bounds as Megatron takes them, on every pipeline stage: attention and rotary positions end with a document."""
    if batch.lengths is None:
        return None
    bounds, longest = batch.cu_seqlens, max(batch.lengths)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=batch.lengths,
    )


def reduce_report(
    reports: Sequence[dict[str, Tensor]],
    supervised_tokens: Mapping[str, int],
    taught: Collection[str],
    sources: Sequence[str],
) -> dict[str, float]:
    """Means over the batches from the micro-batch reports of a last-stage rank: `loss`, `ce/MODE`, `kl/MODE`, and for every name
    in FIT `NAME/MODE` and `NAME/MODE/SOURCE`.

    One all-reduce over the data-parallel group; to be called on every rank of the last pipeline stage. loss is the weighted sum
    that was minimised. ce and kl are in nats per supervised token of the mode, of which there are supervised_tokens in all. FIT is
    per supervised token with a teacher, of all sources or of one; a source without such tokens has no key. kl and FIT are there for
    the modes in `taught` alone. sources: names, in the dataset's order.
    """
    sums = torch.stack([report["sums"] for report in reports]).to(torch.float64).sum(0)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(sums, group=group)
    loss, losses, fits = sums.cpu().split([1, 2 * len(MODES), 4 * len(MODES) * len(sources)])
    values = {"loss": loss.item() / dist.get_world_size(group)}
    by_mode = zip(MODES, losses.view(len(MODES), 2).tolist(), fits.view(len(MODES), 4, len(sources)), strict=True)
    for mode, (ce, kl), fit in by_mode:
        if not supervised_tokens.get(mode):
            continue
        values[f"ce/{mode}"] = ce / supervised_tokens[mode]
        if mode in taught:
            values[f"kl/{mode}"] = kl / supervised_tokens[mode]
            values |= _fit(mode, fit.sum(1).tolist())
            for source, of_source in zip(sources, fit.t().tolist(), strict=True):
                values |= _fit(f"{mode}/{source}", of_source)
    return values


def _fit(where: str, sums: Sequence[float]) -> dict[str, float]:
    tokens, *of_names = sums
    return {f"{name}/{where}": value / tokens for name, value in zip(FIT, of_names, strict=True)} if tokens else {}
