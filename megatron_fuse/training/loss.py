"""The forward step that Megatron's pipeline schedules call, and what becomes of its losses.

Megatron divides a loss by the number of micro-batches, which is undone here, and its data parallelism averages gradients over the
ranks, which is undone in the weights of the tokens (batches.py). So the upstream gradient of every token's loss is exactly 1, and the
loss kernels need not multiply by it.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_fuse.model.attention import PackedDocuments
from megatron_fuse.training.batches import MODES, GlobalBatch, MicroBatch

ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, Callable]]


def make_forward_step(*, micro_batches: int) -> ForwardStep:
    """forward_step(data_iterator, model) for get_forward_backward_func. Its report is a tensor [2 modes x (CE, KL), + loss]."""

    def forward_step(data_iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = next(data_iterator)
        packed = _packed_seq_params(batch)
        output = model(batch.tokens, batch.position_ids, None, labels=batch.targets, packed_seq_params=packed)

        def loss_function(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """losses [6, b, s] in the order of fuse_kernels.TokenLosses."""
            loss = losses[0].sum()
            modes = torch.arange(len(MODES), device=batch.mode.device)
            of_mode = (batch.mode[:, None] == modes).to(losses.dtype)  # [b, modes]
            sums = of_mode.t() @ losses[1:3].detach().sum(dim=2).t()  # [modes, (CE, KL)]
            report = torch.cat([sums.flatten(), loss.detach()[None]])
            # Megatron's division leaves a gradient of 1 / micro_batches, rounded. Divided by that same rounded number it is 1;
            # multiplied by micro_batches it would miss 1 by a rounding. A loss that is not finite gets such a gradient, by
            # whose norm all ranks know that the step is to be skipped: the logit -inf of a label would leave a finite one.
            inverse = torch.full_like(loss.detach(), 1 / micro_batches)
            return loss / inverse.where(loss.detach().isfinite(), math.nan), {"sums": report}

        return output, loss_function

    return forward_step


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


def reduce_report(reports: list[dict[str, Tensor]], batch: GlobalBatch) -> dict[str, float]:
    """Means over the global batch from the micro-batch reports of a last-stage rank: `loss`, `ce/MODE`, `kl/MODE`.

    One all-reduce over the data-parallel group; to be called on every rank of the last pipeline stage. ce and kl are in nats per
    supervised token of the mode, kl only where it has a weight; loss is the weighted sum that was minimised.
    """
    sums = torch.stack([report["sums"] for report in reports]).to(torch.float64).sum(0)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(sums, group=group)
    values = {"loss": sums[-1].item() / dist.get_world_size(group)}
    for mode, (ce, kl) in zip(MODES, sums[:-1].view(len(MODES), 2).tolist(), strict=True):
        if not batch.supervised_tokens.get(mode):
            continue
        values[f"ce/{mode}"] = ce / batch.supervised_tokens[mode]
        if batch.weights[mode][1] > 0:
            values[f"kl/{mode}"] = kl / batch.supervised_tokens[mode]
    return values
