"""What keeps one bad step from spoiling a run: gradients that are not finite, a loss that leaps, replicas that drift apart.

A step whose gradient norm is not finite is skipped: its samples count as consumed, weights and optimizer stay as they were. The
norm is the one number that every rank has: Megatron sums it over the tensor and pipeline ranks (over all ranks, with the
distributed optimizer), and data parallelism has added the gradients up before. So all ranks decide alike without asking each
other. A loss that is not finite comes out of it too, as make_forward_step makes its gradient NaN.
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
from megatron_fuse.text_safety import printable

WINDOW = 64  # losses that a new one is compared with
FEWEST = 16  # of them before anything is called a spike
DEVIATIONS = 10.0
_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
_SHOWN = 16  # example ids in a message


def step_optimizer(optimizer: Any, clip_grad: float) -> float:
    """Megatron's ChainedOptimizer.step() that leaves out a step whose gradient norm is not finite; returns that norm.

    Megatron itself looks for inf only where it scales the loss (fp16). In fp32 and bf16 its step() scales every gradient by
    max_norm / NaN and applies it. Collectives and the one synchronisation (the norm's .item()) are those of step().
    """
    found_inf = optimizer.prepare_grads()
    norm = math.inf if found_inf else float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for part in optimizer.chained_optimizers:
        if clip_grad > 0 and (parameters := part.get_parameters()):
            # By its name in Megatron's module, where runtime/cpu.py puts one for a machine without a GPU.
            megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm


def is_spike(loss: float, last: Sequence[float]) -> bool:
    """Whether a loss lies DEVIATIONS robust standard deviations above the median of the last ones, not counting itself.

    The deviation is the median absolute one (Hampel 1974), at least 1 % of the median: neither moves for a single outlier. The
    answer is the same in any unit of the loss. False while fewer than FEWEST losses are known, and for a falling loss.
    """
    if len(last) < FEWEST:
        return False
    middle = median(last)
    deviation = _NORMAL * median([abs(value - middle) for value in last])
    return loss - middle > DEVIATIONS * max(deviation, 0.01 * abs(middle))


@dataclass
class StepGuard:
    """Watches the steps of one process, and says what its user should know."""

    max_skipped: int  # in a row
    check_for_spikes: bool = True
    skipped_in_a_row: int = 0
    phase: str | None = None  # the losses of another phase are weighted otherwise
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def watch(
        self, iteration: int, phase: str, values: Mapping[str, float], example_ids: Callable[[], Sequence[str]]
    ) -> str | None:
        """A warning about a step that was done, None where there is none.

        values: `grad norm`, the same on every rank, and on ranks of the last stage `loss`. example_ids: of the step's examples,
        asked for only where they are printed. Raises UserError, on every rank alike, after max_skipped skipped steps in a row.
        """
        norm = values["grad norm"]
        if not math.isfinite(norm):
            self.skipped_in_a_row += 1
            found = f"iteration {iteration}: the gradient norm is {norm}, on examples {_named(example_ids())}"
            if self.skipped_in_a_row >= self.max_skipped:
                raise UserError(
                    f"{found}: this is skipped step {self.skipped_in_a_row} in a row (--max-skipped-iterations "
                    f"{self.max_skipped}): lower --lr, or look for NaN in the target's weights; checkpoints hold none of them"
                )
            return f"WARNING: {found}: step skipped ({self.skipped_in_a_row} in a row)"
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
            f"WARNING: iteration {iteration}: the loss is {loss:.4g}, the median of the last {len(self.losses) - 1} was "
            f"{before:.4g}, on examples {_named(example_ids())}"
        )


def _named(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(printable, ids[:_SHOWN])) + rest


def check_weights_across_replicas(chunks: Sequence[torch.nn.Module], iteration: int) -> None:
    """Compares the bytes of every weight on all data-parallel replicas; raises UserError on every rank where one differs.

    As Megatron's check_param_hashes_across_dp_replicas with cross_check, which tells that, but not which weight. Copies all
    weights to the CPU. Collectives: an all-gather of 32 bytes per weight over the data-parallel group, an all-reduce of one
    number over all ranks. With overlap_param_gather trainer.gather_weights has to come before.
    """
    weights = {name: weight for chunk in chunks for name, weight in chunk.named_parameters()}
    digests = [hashlib.sha256(_bytes(weight)).digest() for weight in weights.values()]
    device = next(iter(weights.values())).device
    mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1).to(device)
    group = parallel_state.get_data_parallel_group()
    all_of_them = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(all_of_them, mine, group=group)
    same = (torch.stack(all_of_them) == mine).all(dim=2).all(dim=0).tolist()
    different = [name for name, is_same in zip(weights, same, strict=True) if not is_same]
    anywhere = torch.tensor([len(different)], device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere.item():
        named = f"{', '.join(different[:4])} ({len(different)} of {len(weights)})" if different else "on other ranks"
        raise UserError(
            f"iteration {iteration}: the weights of data-parallel replicas differ: {named}: look for a broken device or link, "
            "and continue from a checkpoint before the last comparison that passed"
        )


def _bytes(weight: torch.Tensor) -> memoryview:
    return weight.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
