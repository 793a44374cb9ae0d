"""The forward step that Megatron's pipeline schedules call, and the report of its losses.

Megatron divides each loss by the number of micro-batches. This file undoes that. Megatron's data parallelism
averages gradients over the ranks. The weights of the tokens undo that (batches.py). So the upstream gradient
of every token's loss is exactly 1, and the loss kernels need not multiply by it.
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

# How well student and teacher agree.
# In the model's output these follow the losses, in this order (fuse_kernels.TokenLosses).
FIT = ("teacher mass", "student mass", "agreement")


def make_forward_step(*, micro_batches: int, sources: int) -> ForwardStep:
    """forward_step(data_iterator, model) for Megatron's get_forward_backward_func.

    Its reports go to reduce_report.

    micro_batches: number of micro-batches of this rank in the step.
    sources: number of sources of the dataset.
    """

    def forward_step(data_iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = next(data_iterator)
        packed = _packed_seq_params(batch)
        output = model(batch.tokens, batch.position_ids, None, labels=batch.targets, packed_seq_params=packed)

        def loss_function(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """losses [6, b, s] in the order of fuse_kernels.TokenLosses."""
            loss = losses[0].sum()
            # Megatron's division gives the gradient 1 / micro_batches, rounded. Divided by the same rounded
            # number it is exactly 1; multiplied by micro_batches it could miss 1 by a rounding error.
            # A loss that is not finite must make the gradient not finite, because all ranks skip a step by
            # the gradient's norm. That does not happen by itself: the logit -inf of a label gives an infinite
            # loss with a finite gradient.
            inverse = torch.full_like(loss.detach(), 1 / micro_batches)
            scaled = loss / inverse.where(loss.detach().isfinite(), math.nan)
            return scaled, {"sums": _sums(losses.detach(), batch, sources)}

        return output, loss_function

    return forward_step


def _sums(losses: Tensor, batch: MicroBatch, sources: int) -> Tensor:
    """Sums over a micro-batch, [1 + modes x 2 + modes x 4 x sources], from losses [6, b, s].

    In this order: the loss; CE and KL of each mode; for each mode and source the number of tokens with a
    teacher, and FIT.
    """
    # Products with one-hot matrices, and no boolean selection: the shapes do not depend on the data, so that
    # nothing waits for the GPU.
    _, ce, kl, teacher_mass, *_ = losses
    of_mode = _one_hot(batch.mode, len(MODES), losses.dtype)  # [b, modes]
    of_source = _one_hot(batch.sources_by_position(), sources, losses.dtype)  # [b, s, sources]
    taught = (teacher_mass > 0).to(losses.dtype)  # the stored mass of a teacher's row is never 0
    fit = torch.stack([taught, *losses[3:]], dim=1) @ of_source  # [b, 4, sources]
    by_mode = torch.stack([ce, kl], dim=1).sum(dim=2)  # [b, 2]
    sums = [losses[0].sum()[None], of_mode.t() @ by_mode, of_mode.t() @ fit.flatten(1)]
    return torch.cat([part.flatten() for part in sums])


def _one_hot(places: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """places [*] -> [*, size]. A place of -1 gives a row of zeros."""
    return (places[..., None] == torch.arange(size, device=places.device)).to(dtype)


def _packed_seq_params(batch: MicroBatch) -> PackedDocuments | None:
    """The documents' bounds in Megatron's form, None for unpacked sequences.

    Every pipeline stage needs them: attention and rotary positions start anew at each document.
    """
    if batch.lengths is None or batch.cu_seqlens is None:
        return None
    return PackedDocuments.of(batch.lengths, batch.cu_seqlens)


def reduce_report(
    reports: Sequence[dict[str, Tensor]],
    supervised_tokens: Mapping[str, int],
    taught: Collection[str],
    sources: Sequence[str],
) -> dict[str, float]:
    """Means over the global batch, from the reports of this last-stage rank's micro-batches.

    Returns `loss`, `ce/MODE`, `kl/MODE`, and for every name in FIT `NAME/MODE` and `NAME/MODE/SOURCE`. loss
    is the weighted sum that the step minimises, without the auxiliary loss of a mixture. ce and kl are in
    nats per supervised token of the mode. FIT is a mean over supervised tokens with a teacher, of all sources
    or of one; a source without such tokens has no key. kl and FIT exist only for the modes in `taught`.

    supervised_tokens: mode -> number of supervised tokens in the global batch.
    sources: names, in the dataset's order.

    Collectives: one all-reduce over the data-parallel group. All ranks of the last pipeline stage must call
    it.
    """
    # The sums go over micro-batches and ranks in fp64. The weights contain the factor data_parallel_size
    # (batches.py): the loss is divided by it again.
    sums = torch.stack([report["sums"] for report in reports]).to(torch.float64).sum(0)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(sums, group=group)
    loss, losses, fits = sums.cpu().split([1, 2 * len(MODES), 4 * len(MODES) * len(sources)])
    values = {"loss": loss.item() / dist.get_world_size(group)}
    by_mode = zip(
        MODES, losses.view(len(MODES), 2).tolist(), fits.view(len(MODES), 4, len(sources)), strict=True
    )
    for mode, (ce, kl), fit in by_mode:
        if not supervised_tokens.get(mode):
            continue
        values[f"ce/{mode}"] = ce / supervised_tokens[mode]
        if mode in taught:
            values[f"kl/{mode}"] = kl / supervised_tokens[mode]
            values |= _fit(mode, fit.sum(1).tolist())
            for source, source_sums in zip(sources, fit.t().tolist(), strict=True):
                values |= _fit(f"{mode}/{source}", source_sums)
    return values


def _fit(where: str, sums: Sequence[float]) -> dict[str, float]:
    """The means of FIT from sums [4]: the number of tokens with a teacher, then FIT.

    Empty without such tokens.
    """
    tokens, *fit_sums = sums
    return (
        {f"{name}/{where}": value / tokens for name, value in zip(FIT, fit_sums, strict=True)}
        if tokens
        else {}
    )
