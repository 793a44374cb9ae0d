"""The loss on a GPU: launches the kernels of triton_kernels.py as custom operators under one autograd
function.

torch.compile and activation checkpointing treat a custom operator as one opaque step, so that they work
around the kernels.

Without a group there are two paths:

- `losses_and_gradient_`, in training: the forward pass writes the gradient. The backward pass is `scale_`
alone.
- `losses`: there is no gradient, or `gradient_` writes it in the backward pass.

Under a group, two operators replace `losses`: `statistics` gives the numbers of this shard for each row,
`losses_of_shards` makes the losses from the numbers of all shards. Between them is the only collective.
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
from fuse_kernels.arguments import Targets
from fuse_kernels.rows import OVERWRITTEN, LossOptions, TokenLosses, VocabularyShard

POWERS = {1.0: 1, 2.0: 2, 4.0: 4}  # temperatures at which one exponential serves both softmaxes
_ROWS_PER_PROGRAM = 128  # of loss_kernel
_STATISTICS, _RESULTS, _COEFFICIENTS = 7, 6, 5  # numbers of a row


def interpreted() -> bool:
    """Whether triton interprets the kernels in Python on CPU tensors (TRITON_INTERPRET=1 set before its first
    import)."""
    return triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Launch:
    """The launch shapes of the kernels that pass over the logits."""

    rows: int  # of a forward tile: the loads that a thread has in flight
    lanes: int  # columns of a forward tile
    block: int  # columns of a backward tile
    splits: int  # programs per row, forward
    split_columns: int
    # Programs per row, backward: more than forward, so that the programs that end last are short.
    gradient_splits: int
    gradient_columns: int
    whole_rows: bool  # one program per row, if the forward pass writes the gradient
    warps: int = 8
    row_warps: int = 32  # warps of a program that has a whole row


def choose_launch(n: int, width: int, element_size: int, processors: int) -> Launch:
    """The launch for n rows of `width` columns, on a device with so many multiprocessors.

    A plain function of the shapes, not a tuner:
    16 bytes per thread and load, and enough programs to fill the device.

    A program that has a whole row reads it twice, the second time from the cache. Long rows get a program of
    32 warps. A multiprocessor holds one such program, so that an H100 has 132 rows between their two readings
    at a time. At 128256 columns of bf16 that is 132 times 256 KB, which fits into its second-level cache of
    50 MB. If rows have at most 128 KB, several of them fit per multiprocessor, in programs of 8 warps.
    """
    warps = 8
    # 32 threads per warp, 16 bytes per thread: the columns that all threads of a program load at once.
    lanes = warps * 32 * 16 // element_size
    tile = 4 * lanes
    wanted = -(-4 * processors // max(n, 1))  # four programs for each multiprocessor
    splits = max(min(wanted, -(-width // tile)), 1)
    split_columns = _multiple(-(-width // splits))
    gradient_splits = max(splits, -(-width // (16 * lanes)))
    gradient_columns = _multiple(-(-width // gradient_splits))
    return Launch(
        rows=4,
        lanes=lanes,
        block=2 * lanes,
        splits=-(-width // split_columns),
        split_columns=split_columns,
        gradient_splits=-(-width // gradient_columns),
        gradient_columns=gradient_columns,
        whole_rows=splits == 1,
        warps=warps,
        row_warps=32 if width * element_size > 1 << 17 else 8,
    )


def row_shape(launch: Launch) -> dict[str, int]:
    """R, C and BLOCK of whole_row_kernel.

    A thread has two loads in flight: four would need too many registers.
    """
    factor = launch.row_warps // launch.warps
    return {"R": min(launch.rows, 2), "C": launch.lanes * factor, "BLOCK": launch.block * factor}


def _multiple(columns: int) -> int:
    """`columns` rounded up to a multiple of 16,
    so that a part of a row begins at an address that allows 16-byte loads."""
    return max(-(-columns // 16) * 16, 16)


def _launch(logits: Tensor) -> Launch:
    n, width = logits.shape
    if interpreted():  # the interpreter's cost is per operation, however large the tile is
        lanes = min(triton.next_power_of_2(max(width, 1)), 1 << 15)
        half = _multiple(-(-width // 2))  # two splits, so that tests meet more than one
        splits = -(-width // half)
        return Launch(1, lanes, lanes, splits, half, splits, half, whole_rows=True, row_warps=8)
    processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    return choose_launch(n, width, logits.element_size(), processors)


def triton_loss(
    logits: Tensor,
    targets: Targets,
    options: LossOptions,
    shard: VocabularyShard,
    *,
    in_forward: bool,
) -> TokenLosses:
    """The losses of `sparse_kl_cross_entropy`, [n] each, in fp32.

    The gradient is written over the logits [n, v]: in the forward pass if in_forward (only without a group),
    else in the backward pass. No other code may need the logits after that, and a second backward pass
    through the same graph raises RuntimeError. While the forward kernels run, k columns of every row hold
    -inf. They get their logits back, or become gradient.

    Collectives: under a group one all-gather of seven fp32 numbers per row and rank, in the forward pass.
    """
    return TokenLosses(*_TritonLoss.apply(logits, *targets, options, shard, in_forward))


class _TritonLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits,
        labels,
        teacher_ids,
        teacher_logprobs,
        ce_weight,
        kl_weight,
        options,
        shard,
        in_forward,
    ):
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        targets = Targets(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
        if in_forward:
            losses, *gradient = triton_losses_and_gradient_(logits, targets, options, shard)
            state = tuple(gradient)
        else:
            losses, state = triton_losses(logits, targets, options, shard)
        ctx.save_for_backward(logits, *state)
        ctx.call = (options, shard, in_forward)
        ctx.given_away = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_others):
        nothing = (None,) * 8
        if upstream is None:
            return None, *nothing
        if ctx.given_away:
            raise RuntimeError(OVERWRITTEN)
        ctx.given_away = True
        options, shard, in_forward = ctx.call
        logits, *state = ctx.saved_tensors
        if in_forward:
            torch.ops.fuse_kernels.scale_(logits, upstream.float().contiguous(), *state)
        else:
            triton_gradient_(logits, upstream, state, options, shard)
        return logits, *nothing


def triton_losses(
    logits: Tensor, targets: Targets, options: LossOptions, shard: VocabularyShard
) -> tuple[TokenLosses, tuple[Tensor, ...]]:
    """The losses [n] each, and the state that the gradient needs from the forward pass, which is O(n k).

    logits [n, v], with unit stride along v. Collectives: as of `triton_loss`.
    """
    contiguous = _contiguous(targets)
    place = (options.temperature, options.tail, options.softcap, shard.columns, shard.start)
    if shard.group is None:
        results, *state = torch.ops.fuse_kernels.losses(logits, *contiguous, *place)
        return TokenLosses(*results), (*state, contiguous.labels)
    local, weights, teacher, columns, mass, on_ids, label_logit = torch.ops.fuse_kernels.statistics(
        logits, *contiguous, *place
    )
    # The rest of the state concerns this shard's columns alone and stays here:
    # only the statistics [7, n] are exchanged.
    all_shards = local.new_empty((dist.get_world_size(shard.group), *local.shape))
    dist.all_gather_into_tensor(all_shards.view(-1, local.shape[1]), local, group=shard.group)
    results, coefficients = torch.ops.fuse_kernels.losses_of_shards(
        all_shards, teacher, weights, contiguous.labels, options.temperature
    )
    return TokenLosses(*results), (
        weights,
        coefficients,
        columns,
        mass,
        on_ids,
        label_logit,
        contiguous.labels,
    )


def triton_losses_and_gradient_(
    logits: Tensor, targets: Targets, options: LossOptions, shard: VocabularyShard
) -> tuple[TokenLosses, Tensor]:
    """The losses [n] each, and the effective weights [2, n].

    Writes the gradient of sum(loss) over the logits [n, v].

    Collectives: as of `triton_loss`.
    """
    if shard.group is None:
        place = (options.temperature, options.tail, options.softcap, shard.columns, shard.start)
        results, weights = torch.ops.fuse_kernels.losses_and_gradient_(logits, *_contiguous(targets), *place)
        return TokenLosses(*results), weights
    losses, state = triton_losses(logits, targets, options, shard)
    triton_gradient_(logits, None, state, options, shard)
    return losses, state[0]


def triton_gradient_(
    logits: Tensor,
    upstream: Tensor | None,
    state: Sequence[Tensor],
    options: LossOptions,
    shard: VocabularyShard,
) -> None:
    """Writes the gradient of sum(upstream [n] * loss) over the logits
    [n, v]. upstream None means 1. No collective."""
    if upstream is not None:
        upstream = upstream.float().contiguous()
    place = (options.temperature, options.softcap, shard.columns, shard.start)
    torch.ops.fuse_kernels.gradient_(logits, upstream, *state, *place)


def _contiguous(targets: Targets) -> Targets:
    labels, teacher_ids, *rest = targets
    return Targets(*(tensor.contiguous() for tensor in (labels.long(), teacher_ids.long(), *rest)))


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the device of the first tensor the current one during a launch:
    Triton launches on the current device."""

    @functools.wraps(launch)
    def guarded(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments, **named)

    return guarded


class _Gathered:
    """What gather_kernel writes, for the kernels after it."""

    def __init__(self, logits: Tensor, k: int) -> None:
        n = len(logits)
        self.weights = _fp32(logits, 2, n)
        self.teacher = _fp32(logits, 4, n)
        self.columns = logits.new_empty((n, k), dtype=torch.int32)
        self.mass, self.on_ids = _fp32(logits, n, k), _fp32(logits, n, k)
        self.label_logit = _fp32(logits, n)

    def launch(self, logits: Tensor, targets: Targets, tail: str, real_columns: int, start: int) -> None:
        n, k = self.columns.shape
        kernels.gather_kernel[(n,)](
            logits, *targets, self.weights, self.teacher, self.columns, self.mass, self.on_ids,
            self.label_logit,
            logits.stride(0), n, real_columns, start, k, TAIL=tail, K=slots_of(k),
            num_warps=gather_warps(slots_of(k)),
        )  # fmt: skip


def gather_warps(slots: int) -> int:
    """Warps of gather_kernel: as many as let a thread compare at most 16 pairs of entries at once."""
    return max(slots // 32, 1)


def slots_of(k: int) -> int:
    return triton.next_power_of_2(max(k, 1))


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _off_ids(
    logits: Tensor,
    weights: Tensor,
    launch: Launch,
    temperature: float,
    softcap: float | None,
    real_columns: int,
) -> Tensor:
    """PARTS [splits, 3, n] of off_ids_kernel: the maximum and the two sums of the columns off the ids, per
    part of a row."""
    n = len(logits)
    parts = _fp32(logits, launch.splits, 3, n)
    kernels.off_ids_kernel[(n, launch.splits)](
        logits, weights, parts, logits.stride(0), n, real_columns, launch.split_columns, 1.0 / temperature,
        R=launch.rows, C=launch.lanes, T_MODE=POWERS.get(temperature, 0), CAP=softcap,
        num_warps=launch.warps,
    )  # fmt: skip
    return parts


def _finish(
    logits: Tensor,
    gathered: _Gathered,
    parts: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    *,
    statistics: Tensor | None = None,
    results: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> None:
    """Puts the logits back and writes this shard's statistics or, without a group, results and
    coefficients.
    """
    n, k = gathered.columns.shape
    kernels.finish_kernel[(n,)](
        logits, gathered.weights, parts, gathered.columns, gathered.mass, gathered.on_ids,
        gathered.label_logit, labels,
        gathered.teacher, statistics, results, coefficients, logits.stride(0), n, k, len(parts),
        1.0 / temperature,
        K=slots_of(k), CAP=softcap, num_warps=1,
    )  # fmt: skip


@torch.library.custom_op("fuse_kernels::losses", mutates_args=())
@on_its_device
def losses(
    logits: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    tail: str,
    softcap: float | None,
    real_columns: int,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """results [6, n]; and for `gradient_`:
    weights [2, n], coefficients [5, n], columns, mass, on_ids [n, k], label_logit [n]."""
    gathered = _Gathered(logits, teacher_ids.shape[1])
    results, coefficients = _fp32(logits, _RESULTS, len(logits)), _fp32(logits, _COEFFICIENTS, len(logits))
    if len(logits):
        targets = Targets(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
        gathered.launch(logits, targets, tail, real_columns, start)
        parts = _off_ids(logits, gathered.weights, _launch(logits), temperature, softcap, real_columns)
        _finish(
            logits, gathered, parts, labels, temperature, softcap, results=results, coefficients=coefficients
        )
    return (
        results,
        gathered.weights,
        coefficients,
        gathered.columns,
        gathered.mass,
        gathered.on_ids,
        gathered.label_logit,
    )


@losses.register_fake
def _(
    logits,
    labels,
    teacher_ids,
    teacher_logprobs,
    ce_weight,
    kl_weight,
    temperature,
    tail,
    softcap,
    real_columns,
    start,
):
    gathered = _Gathered(logits, teacher_ids.shape[1])
    results, coefficients = _fp32(logits, _RESULTS, len(logits)), _fp32(logits, _COEFFICIENTS, len(logits))
    return (
        results,
        gathered.weights,
        coefficients,
        gathered.columns,
        gathered.mass,
        gathered.on_ids,
        gathered.label_logit,
    )


@torch.library.custom_op("fuse_kernels::losses_and_gradient_", mutates_args=("logits",))
@on_its_device
def losses_and_gradient_(
    logits: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    tail: str,
    softcap: float | None,
    real_columns: int,
    start: int,
) -> tuple[Tensor, Tensor]:
    """results [6, n] and weights [2, n]. Writes the gradient of sum(loss) over the logits [n, v]."""
    (n, width), k = logits.shape, teacher_ids.shape[1]
    gathered = _Gathered(logits, k)
    results, coefficients = _fp32(logits, _RESULTS, n), _fp32(logits, _COEFFICIENTS, n)
    if n == 0:
        return results, gathered.weights
    targets = Targets(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
    gathered.launch(logits, targets, tail, real_columns, start)
    # From here on the row holds -inf on the ids. Both branches leave a gradient there that is not the final
    # one; the last launch rewrites the columns of entries and label.
    launch = _launch(logits)
    if launch.whole_rows:
        kernels.whole_row_kernel[(n,)](
            logits, labels, gathered.weights, gathered.teacher, gathered.columns, gathered.mass,
            gathered.on_ids,
            gathered.label_logit, results, coefficients, logits.stride(0), n, real_columns, width, k,
            1.0 / temperature,
            K=slots_of(k), **row_shape(launch), T_MODE=POWERS.get(temperature, 0), ROUND=interpreted(),
            CAP=softcap, num_warps=launch.row_warps,
        )  # fmt: skip
    else:  # few rows: a program for each would leave processors idle
        parts = _off_ids(logits, gathered.weights, launch, temperature, softcap, real_columns)
        _finish(
            logits, gathered, parts, labels, temperature, softcap, results=results, coefficients=coefficients
        )
        _gradient(logits, None, gathered.weights, coefficients, launch, temperature, softcap, real_columns)
    _special_gradient(
        logits, None, gathered.weights, coefficients, labels, gathered.label_logit, gathered.columns,
        gathered.mass,
        gathered.on_ids, temperature, softcap, real_columns, start,
    )  # fmt: skip
    return results, gathered.weights


@losses_and_gradient_.register_fake
def _(
    logits,
    labels,
    teacher_ids,
    teacher_logprobs,
    ce_weight,
    kl_weight,
    temperature,
    tail,
    softcap,
    real_columns,
    start,
):
    return _fp32(logits, _RESULTS, len(logits)), _fp32(logits, 2, len(logits))


@torch.library.custom_op("fuse_kernels::scale_", mutates_args=("gradient",))
@on_its_device
def scale_(gradient: Tensor, upstream: Tensor, weights: Tensor) -> None:
    """Multiplies each row of gradient [n, v] by its upstream [n], if that is not 1."""
    n, width = gradient.shape
    if n == 0:
        return
    launch = _launch(gradient)
    kernels.scale_kernel[(n, launch.gradient_splits)](
        gradient, upstream, weights, gradient.stride(0), n, width, launch.gradient_columns,
        BLOCK=launch.block, ROUND=interpreted(), num_warps=launch.warps,
    )  # fmt: skip


@torch.library.custom_op("fuse_kernels::statistics", mutates_args=())
@on_its_device
def statistics(
    logits: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    tail: str,
    softcap: float | None,
    real_columns: int,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of this shard: statistics [7, n], weights [2, n], teacher [4, n], columns, mass, on_ids
    [n, k], label_logit [n]."""
    gathered, local = _Gathered(logits, teacher_ids.shape[1]), _fp32(logits, _STATISTICS, len(logits))
    if len(logits):
        targets = Targets(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
        gathered.launch(logits, targets, tail, real_columns, start)
        parts = _off_ids(logits, gathered.weights, _launch(logits), temperature, softcap, real_columns)
        _finish(logits, gathered, parts, labels, temperature, softcap, statistics=local)
    return (
        local,
        gathered.weights,
        gathered.teacher,
        gathered.columns,
        gathered.mass,
        gathered.on_ids,
        gathered.label_logit,
    )


@statistics.register_fake
def _(
    logits,
    labels,
    teacher_ids,
    teacher_logprobs,
    ce_weight,
    kl_weight,
    temperature,
    tail,
    softcap,
    real_columns,
    start,
):
    gathered, local = _Gathered(logits, teacher_ids.shape[1]), _fp32(logits, _STATISTICS, len(logits))
    return (
        local,
        gathered.weights,
        gathered.teacher,
        gathered.columns,
        gathered.mass,
        gathered.on_ids,
        gathered.label_logit,
    )


@torch.library.custom_op("fuse_kernels::losses_of_shards", mutates_args=())
@on_its_device
def losses_of_shards(
    everyone: Tensor, teacher: Tensor, weights: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """results [6, n] and coefficients [5, n], all fp32, from the statistics [shards, 7, n] of all shards."""
    n = len(labels)
    results, coefficients = _fp32(everyone, _RESULTS, n), _fp32(everyone, _COEFFICIENTS, n)
    if n:
        grid = (triton.cdiv(n, _ROWS_PER_PROGRAM),)
        kernels.loss_kernel[grid](
            everyone, teacher, weights, labels, results, coefficients, n, len(everyone), 1.0 / temperature,
            B=_ROWS_PER_PROGRAM,
        )  # fmt: skip
    return results, coefficients


@losses_of_shards.register_fake
def _(everyone, teacher, weights, labels, temperature):
    return _fp32(everyone, _RESULTS, len(labels)), _fp32(everyone, _COEFFICIENTS, len(labels))


@torch.library.custom_op("fuse_kernels::gradient_", mutates_args=("logits",))
@on_its_device
def gradient_(
    logits: Tensor,
    upstream: Tensor | None,
    weights: Tensor,
    coefficients: Tensor,
    columns: Tensor,
    mass: Tensor,
    on_ids: Tensor,
    label_logit: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    real_columns: int,
    start: int,
) -> None:
    """Writes the gradient over the logits [n, v]. No collective."""
    if len(logits) == 0:
        return
    _gradient(logits, upstream, weights, coefficients, _launch(logits), temperature, softcap, real_columns)
    _special_gradient(
        logits, upstream, weights, coefficients, labels, label_logit, columns, mass, on_ids, temperature,
        softcap,
        real_columns,
        start,
    )  # fmt: skip


def _gradient(
    logits, upstream, weights, coefficients, launch: Launch, temperature: float, softcap: float | None,
    real_columns: int,
) -> None:  # fmt: skip
    n, width = logits.shape
    kernels.gradient_kernel[(n, launch.gradient_splits)](
        logits, upstream, weights, coefficients, logits.stride(0), n, real_columns, width,
        launch.gradient_columns,
        1.0 / temperature,
        BLOCK=launch.block, T_MODE=POWERS.get(temperature, 0), ROUND=interpreted(), CAP=softcap,
        num_warps=launch.warps,
    )  # fmt: skip


def _special_gradient(
    logits, upstream, weights, coefficients, labels, label_logit, columns, mass, on_ids, temperature, softcap,
    real_columns, start
) -> None:  # fmt: skip
    n, k = columns.shape
    kernels.special_gradient_kernel[(n,)](
        logits, upstream, weights, coefficients, labels, label_logit, columns, mass, on_ids,
        logits.stride(0), n,
        real_columns, start, k, 1.0 / temperature, K=slots_of(k), ROUND=interpreted(), CAP=softcap,
        num_warps=1,
    )  # fmt: skip
