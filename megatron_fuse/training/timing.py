"""The times of the parts of a step, by Megatron-core's own timers: --timing-log-level with Megatron-LM's
names and meanings.

Megatron's schedules time themselves, the trainer times the rest. A timer waits for the GPU when it starts and
when it stops. Before a timer of level 1 starts, the ranks also wait for each other. At level 0 there are no
timers, and nothing waits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.timers import Timers
from megatron.core.transformer.transformer_config import TransformerConfig

T = TypeVar("T")

# Timer -> the lowest level that has it. The timers of a step:
STEP_TIMERS = {
    "forward-backward": 1,  # Megatron's: the schedule as a whole
    # Megatron's, within it: what is left of the gradients' reduction after the last backward pass.
    "all-grads-sync": 1,
    "optimizer": 1,  # the gradient's norm, clipping, the update
    # Megatron's: forward passes and losses, and what they wait for: their micro-batches.
    "forward-compute": 2,
    # What a step holds; within forward-compute, its micro-batches: read, collated, sent to the device.
    "batch-generator": 2,
    "backward-compute": 2,  # Megatron's: backward passes
    # Megatron's, between pipeline stages: transfers, and the wait for the other stage
    "forward-recv": 2,
    "forward-send": 2,
    "backward-recv": 2,
    "backward-send": 2,
    "forward-send-forward-recv": 2,
    "forward-send-backward-recv": 2,
    "backward-send-forward-recv": 2,
    "backward-send-backward-recv": 2,
    "forward-backward-send-forward-backward-recv": 2,
}
SAVE = "save-checkpoint"  # the time that training waits; with --async-save that is only a part of the save
_LEVELS = {**STEP_TIMERS, SAVE: 1}


class StepTimers:
    """The timers of one rank. level: 0 makes every method do nothing. config: the one that Megatron's
    schedule reads.
    """

    def __init__(self, level: int, config: TransformerConfig) -> None:
        self._timers = Timers(level, "max")
        self._levels = {name: of_timer for name, of_timer in _LEVELS.items() if of_timer <= level}
        config.timers = self._timers if level else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block. If the timer is of level 1, every rank must enter it."""
        if name not in self._levels:
            yield
            return
        timer = self._timers(name, log_level=_LEVELS[name])
        timer.start(barrier=_LEVELS[name] == 1)
        yield
        timer.stop()

    def each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """Yields the items and times how long each takes to arrive."""
        while True:
            with self(name):
                try:
                    item = next(items)
                except StopIteration:
                    break
            yield item

    def seconds(self, *names: str) -> dict[str, float]:
        """`seconds/NAME` since the last reset, on the rank where it is longest. Timers that no rank has used
        are left out.

        All ranks must call it. Collectives: one all-reduce over all ranks;
        none if no timer exists at this level.
        """
        asked = [name for name in names if name in self._levels]
        if not asked:
            return {}
        elapsed = [self._timers(name, log_level=_LEVELS[name]).elapsed(reset=False) for name in asked]
        longest = torch.tensor(elapsed, dtype=torch.float64, device=torch.cuda.current_device())
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        return {
            f"seconds/{name}": value for name, value in zip(asked, longest.tolist(), strict=True) if value > 0
        }

    def reset(self) -> None:
        """Sets every timer back to 0."""
        for name in self._levels:
            self._timers(name, log_level=_LEVELS[name]).reset()
