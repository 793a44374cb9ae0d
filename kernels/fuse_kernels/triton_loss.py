"""The loss on a GPU: launches the kernels of triton_kernels.py as three custom operators under one autograd function.

Operators, so that torch.compile and activation checkpointing take them as they are: `statistics` (this shard's numbers of a
row), `losses` (from all shards' numbers), `gradient_` (over the logits). Between the first two lies the only collective.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse_kernels import triton_kernels as kernels
from fuse_kernels.rows import OVERWRITTEN, VocabularyShard

_POWERS = {1.0: 1, 2.0: 2, 4.0: 4}  # temperatures at which one exponential serves both softmaxes
_ROWS_PER_PROGRAM = 128  # of loss_kernel


def interpreted() -> bool:
    """Whether triton runs kernels in Python, on CPU tensors (TRITON_INTERPRET=1 before its first import)."""
    return triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Launch:
    """Shapes of the two kernels that pass over the logits."""

    rows: int  # of a forward tile, loads that a thread has in flight
    lanes: int  # columns of a forward tile
    block: int  # columns of a backward tile
    splits: int  # programs per row
    split_columns: int
    warps: int = 8


def choose_launch(n: int, width: int, element_size: int, processors: int) -> Launch:
    """A plain function of the shapes, not a tuner: 16 bytes per thread and load, and enough programs to fill the device."""
    warps = 8
    lanes = warps * 32 * 16 // element_size
    tile = 4 * lanes
    wanted = -(-4 * processors // max(n, 1))  # four programs for each multiprocessor
    splits = max(min(wanted, -(-width // tile)), 1)
    split_columns = _multiple(-(-width // splits))
    return Launch(4, lanes, 2 * lanes, -(-width // split_columns), split_columns, warps)


def _multiple(columns: int) -> int:
    """Up to a multiple of 16, so that a part of a row begins where 16-byte loads may."""
    return max(-(-columns // 16) * 16, 16)


def _launch(logits: Tensor) -> Launch:
    n, width = logits.shape
    if interpreted():  # its cost is per operation, whatever the tile
        lanes = min(triton.next_power_of_2(max(width, 1)), 1 << 15)
        half = _multiple(-(-width // 2))  # two splits, so that tests meet more than one
        return Launch(1, lanes, lanes, -(-width // half), half)
    processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    return choose_launch(n, width, logits.element_size(), processors)


def triton_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    tail: str,
    shard: VocabularyShard,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, ce, kl [n] as `sparse_kl_cross_entropy` defines them, in fp32.

    Backward writes the gradient over the logits [n, v]: nobody else may need them then, and a second backward through the
    same graph raises RuntimeError. While the forward kernels run, k columns of every row hold -inf; they are put back.
    Under a group: one all-gather of five fp32 (20 bytes) per row and rank, forward.
    """
    return _TritonLoss.apply(
        logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature, tail, shard
    )


class _TritonLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature, tail, shard):
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        arguments = (labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
        (loss, ce, kl), state = triton_losses(logits, *arguments, temperature, tail, shard)
        ctx.save_for_backward(logits, *state)
        ctx.options = (temperature, shard)
        ctx.overwritten = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _ce, _kl):
        nothing = (None,) * 8
        if upstream is None:
            return None, *nothing
        if ctx.overwritten:
            raise RuntimeError(OVERWRITTEN)
        ctx.overwritten = True
        logits, *state = ctx.saved_tensors
        triton_gradient_(logits, upstream, state, *ctx.options)
        return logits, *nothing


def triton_losses(
    logits: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    tail: str,
    shard: VocabularyShard,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """loss, ce, kl [n] from logits [n, v] with unit stride along v, and what the gradient takes from here: O(n k)."""
    labels, teacher_ids = labels.long().contiguous(), teacher_ids.long().contiguous()
    rest = (teacher_logprobs.contiguous(), ce_weight.contiguous(), kl_weight.contiguous())
    own, weights, teacher, columns, mass, on_ids, label_logit = torch.ops.fuse_kernels.statistics(
        logits, labels, teacher_ids, *rest, temperature, tail, shard.columns, shard.start
    )
    everyone = own[None]
    if shard.group is not None:
        everyone = own.new_empty((dist.get_world_size(shard.group), *own.shape))
        dist.all_gather_into_tensor(everyone.view(-1, own.shape[1]), own, group=shard.group)
    loss, ce, kl, coefficients = torch.ops.fuse_kernels.losses(everyone, teacher, weights, labels, temperature)
    return (loss, ce, kl), (weights, coefficients, labels, label_logit, columns, mass, on_ids)


def triton_gradient_(
    logits: Tensor, upstream: Tensor, state: Sequence[Tensor], temperature: float, shard: VocabularyShard
) -> None:
    """Writes the gradient of sum(upstream [n] * loss) over the logits [n, v]. No collective."""
    place = (temperature, shard.columns, shard.start)
    torch.ops.fuse_kernels.gradient_(logits, upstream.float().contiguous(), *state, *place)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whatever device the first tensor is on."""

    @functools.wraps(launch)
    def guarded(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments, **named)

    return guarded


@torch.library.custom_op("fuse_kernels::statistics", mutates_args=())
@_on_its_device
def statistics(
    logits: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    tail: str,
    real_columns: int,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What this shard knows: statistics [5, n], weights [2, n], teacher [3, n], columns, mass, on_ids [n, k], label_logit [n]."""
    outputs = _statistics_outputs(logits, teacher_ids)
    own, weights, teacher, columns, mass, on_ids, label_logit = outputs
    n, k = teacher_ids.shape
    if n == 0:
        return outputs
    launch, slots, inv_t = _launch(logits), triton.next_power_of_2(max(k, 1)), 1.0 / temperature
    parts = logits.new_empty((launch.splits, 3, n), dtype=torch.float32)
    stride = logits.stride(0)
    kernels.gather_kernel[(n,)](
        logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, weights, teacher, columns, mass, on_ids,
        label_logit, stride, n, real_columns, start, k, TAIL=tail, K=slots, num_warps=1,
    )  # fmt: skip
    kernels.off_ids_kernel[(n, launch.splits)](
        logits, weights, parts, stride, n, real_columns, launch.split_columns, inv_t,
        R=launch.rows, C=launch.lanes, T_MODE=_POWERS.get(temperature, 0), num_warps=launch.warps,
    )  # fmt: skip
    kernels.finish_kernel[(n,)](
        logits, weights, parts, columns, mass, on_ids, label_logit, own, stride, n, k, launch.splits, inv_t,
        K=slots, num_warps=1,
    )  # fmt: skip
    return outputs


def _statistics_outputs(logits: Tensor, teacher_ids: Tensor) -> tuple[Tensor, ...]:
    n, k = teacher_ids.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    return (
        empty(5, n),
        empty(2, n),
        empty(3, n),
        empty(n, k, dtype=torch.int32),
        empty(n, k),
        empty(n, k),
        empty(n),
    )


@statistics.register_fake
def _(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature, tail, real_columns, start):
    return _statistics_outputs(logits, teacher_ids)


@torch.library.custom_op("fuse_kernels::losses", mutates_args=())
@_on_its_device
def losses(
    everyone: Tensor, teacher: Tensor, weights: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, ce, kl [n] and coefficients [5, n], all fp32, from the statistics [shards, 5, n] of all shards."""
    outputs = _losses_outputs(labels)
    n = len(labels)
    if n:
        grid = (triton.cdiv(n, _ROWS_PER_PROGRAM),)
        kernels.loss_kernel[grid](
            everyone, teacher, weights, labels, *outputs, n, len(everyone), 1.0 / temperature, B=_ROWS_PER_PROGRAM
        )
    return outputs


def _losses_outputs(labels: Tensor) -> tuple[Tensor, ...]:
    n = len(labels)
    return tuple(labels.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (n,), (5, n)))


@losses.register_fake
def _(everyone, teacher, weights, labels, temperature):
    return _losses_outputs(labels)


@torch.library.custom_op("fuse_kernels::gradient_", mutates_args=("logits",))
@_on_its_device
def gradient_(
    logits: Tensor,
    upstream: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    labels: Tensor,
    label_logit: Tensor,
    columns: Tensor,
    mass: Tensor,
    on_ids: Tensor,
    temperature: float,
    real_columns: int,
    start: int,
) -> None:
    """Writes the gradient over the logits [n, v]. No collective."""
    n, k = columns.shape
    if n == 0:
        return
    launch, slots, inv_t = _launch(logits), triton.next_power_of_2(max(k, 1)), 1.0 / temperature
    stride, mode, rounds = logits.stride(0), _POWERS.get(temperature, 0), interpreted()
    kernels.gradient_kernel[(n, launch.splits)](
        logits, upstream, weights, coefficients, stride, n, real_columns, logits.shape[1], launch.split_columns, inv_t,
        BLOCK=launch.block, T_MODE=mode, ROUND=rounds, num_warps=launch.warps,
    )  # fmt: skip
    kernels.special_gradient_kernel[(n,)](
        logits, upstream, weights, coefficients, labels, label_logit, columns, mass, on_ids, stride, n, real_columns,
        start, k, inv_t, K=slots, ROUND=rounds, num_warps=1,
    )  # fmt: skip
