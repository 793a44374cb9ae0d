"""Guards against a bad step: gradients that are not finite, a spike of the loss,
replicas with different weights.

A step whose gradient norm is not finite is skipped: its samples count as consumed, weights and optimizer stay
as they were. The norm is the same number on every rank: Megatron sums it over the tensor and pipeline ranks
(over all ranks, with the distributed optimizer), after data parallelism has added the gradients up. So all
ranks decide alike without a collective of their own. A loss that is not finite makes the norm not finite too,
because make_forward_step makes its gradient NaN.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import optimizer as megatron_optimizer

from megatron_fuse.errors import UserError
from megatron_fuse.model.weight_blocks import is_of_expert
from megatron_fuse.text_safety import printable

WINDOW = 64  # a new loss is compared with so many losses before it
FEWEST = 16  # with fewer losses before it, no loss is called a spike
DEVIATIONS = 10.0
_NORMAL = 1.4826  # the standard deviation of a normal distribution, divided by its median absolute deviation
_SHOWN = 16  # example ids that a message shows


def step_optimizer(optimizer: Any, clip_grad: float) -> float:
    """Megatron's ChainedOptimizer.step(), but a step whose gradient norm is not finite is skipped. Returns
    the norm.

    Megatron itself looks for inf only if it scales the loss (fp16). In fp32 and bf16 its step() scales every
    gradient by max_norm / NaN and applies the result. Collectives and the one synchronisation (the norm's
    .item()) are those of step().
    """
    found_inf = optimizer.prepare_grads()
    norm = math.inf if found_inf else float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for part in optimizer.chained_optimizers:
        if clip_grad > 0 and (parameters := part.get_parameters()):
            # Called through Megatron's module: runtime/cpu.py replaces the function there on a machine
            # without a GPU.
            megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm


def is_spike(loss: float, last: Sequence[float]) -> bool:
    """Whether a loss lies more than DEVIATIONS robust standard deviations above the median of the `last`
    losses.

    `last` does not contain the loss itself. The deviation comes from the median absolute deviation (Hampel
    1974) and is at least 1 % of the median. A single outlier changes neither. The answer does not depend on
    the unit of the loss. False with fewer than FEWEST losses, and for a falling loss.
    """
    if len(last) < FEWEST:
        return False
    middle = median(last)
    deviation = _NORMAL * median([abs(value - middle) for value in last])
    return loss - middle > DEVIATIONS * max(deviation, 0.01 * abs(middle))


@dataclass
class StepGuard:
    """Watches the steps of one process and warns of skipped steps and of spikes."""

    max_skipped: int  # skipped steps in a row that end the run
    check_for_spikes: bool = True
    skipped_in_a_row: int = 0
    phase: str | None = (
        None  # the phase of `losses`: another phase has other weights, so that its losses do not compare
    )
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def watch(
        self,
        iteration: int,
        phase: str,
        values: Mapping[str, float],
        example_ids: Callable[[], Sequence[str]],
    ) -> str | None:
        """A warning about a finished step, or None.

        values: `grad norm`, the same on every rank; on ranks of the last stage also `loss`.
        example_ids: returns the ids of the step's examples; called only if they are printed.

        Raises UserError, on every rank, after max_skipped skipped steps in a row.
        """
        norm = values["grad norm"]
        if not math.isfinite(norm):
            self.skipped_in_a_row += 1
            problem = (
                f"iteration {iteration}: the gradient norm is {norm}, on examples {_named(example_ids())}"
            )
            if self.skipped_in_a_row >= self.max_skipped:
                raise UserError(
                    f"{problem}: this is skipped step {self.skipped_in_a_row} in a row "
                    f"(--max-skipped-iterations {self.max_skipped}). Lower --lr, or look for NaN in the "
                    "target's weights. The checkpoints hold none of the skipped steps."
                )
            return f"{problem}: step skipped ({self.skipped_in_a_row} in a row)"
        self.skipped_in_a_row = 0
        if phase != self.phase:
            self.phase = phase
            self.losses.clear()
        loss = values.get("loss")
        if not self.check_for_spikes or loss is None:
            return None
        spike = is_spike(loss, self.losses)
        before = median(self.losses) if spike else math.nan
        self.losses.append(loss)
        if not spike:
            return None
        return (
            f"iteration {iteration}: the loss is {loss:.4g}, the median of the last {len(self.losses) - 1} "
            f"was {before:.4g}, on examples {_named(example_ids())}"
        )


def _named(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(printable, ids[:_SHOWN])) + rest


def check_weights_across_replicas(chunks: Sequence[torch.nn.Module], iteration: int) -> None:
    """Compares the bytes of every weight on all data-parallel replicas; of experts, on the ranks that hold
    the same experts.

    Raises UserError on every rank if a weight differs.

    Megatron's check_param_hashes_across_dp_replicas with cross_check does the same, but does not say which
    weight differs. This copies all weights to the CPU. With overlap_param_gather, call trainer.gather_weights
    first. Collectives: an all-gather of 32 bytes per weight over the data-parallel group, and over the expert
    data-parallel group of a mixture; an all-reduce of one number over all ranks.
    """
    # Every chunk of a virtual pipeline counts its layers from 0.
    weights = {
        f"chunk {number}: {name}" if len(chunks) > 1 else name: weight
        for number, chunk in enumerate(chunks)
        for name, weight in chunk.named_parameters()
    }
    device = next(iter(weights.values())).device
    experts = {name: weight for name, weight in weights.items() if is_of_expert(name)}
    others = {name: weight for name, weight in weights.items() if name not in experts}
    different = _different(others, parallel_state.get_data_parallel_group())
    if experts:
        different += _different(experts, parallel_state.get_expert_data_parallel_group())
    # A replica of another tensor or pipeline rank may differ: all ranks must raise the error together.
    anywhere = torch.tensor([len(different)], device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere.item():
        named = (
            f"{', '.join(different[:4])} ({len(different)} of {len(weights)})"
            if different
            else "on other ranks"
        )
        raise UserError(
            f"iteration {iteration}: the weights of data-parallel replicas differ: {named}. Look for a "
            "broken device or link, and continue from a checkpoint before the last comparison without a "
            "difference."
        )


def _different(weights: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> list[str]:
    """The names of the weights whose bytes are not the same on all ranks of a group."""
    device = next(iter(weights.values())).device
    digests = [hashlib.sha256(_bytes(weight)).digest() for weight in weights.values()]
    local = (
        torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1).to(device)
    )
    all_replicas = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(all_replicas, local, group=group)
    same = (torch.stack(all_replicas) == local).all(dim=2).all(dim=0).tolist()
    return [name for name, is_same in zip(weights, same, strict=True) if not is_same]


def _bytes(weight: torch.Tensor) -> memoryview:
    return weight.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
