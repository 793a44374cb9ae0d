"""Where the time of a step goes, by Megatron-core's own timers: --timing-log-level with Megatron-LM's names and meanings.

Megatron's schedules time themselves, the trainer times the rest. A timer waits for the GPU as it starts and as it stops, and at a
timer of level 1 the ranks wait for each other first. At level 0 there are no timers, and nothing waits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.timers import Timers
from megatron.core.transformer.transformer_config import TransformerConfig

T = TypeVar("T")

# Timer -> the level from which it is there. Of a step:
STEP_TIMERS = {
    "forward-backward": 1,  # Megatron's: the schedule as a whole
    "all-grads-sync": 1,  # Megatron's, within it: what is left of the gradients' reduction after the last backward pass
    "optimizer": 1,  # the gradient's norm, clipping, the update
    "forward-compute": 2,  # Megatron's: forward passes and losses, and what they wait for: their micro-batches
    "batch-generator": 2,  # what a step holds; within forward-compute, its micro-batches: read, collated, sent to the device
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
SAVE = "save-checkpoint"  # as long as training waits for it, which is not all of it with --async-save
_LEVELS = {**STEP_TIMERS, SAVE: 1}


class StepTimers:
    """The timers of one rank. level: 0 makes every method do nothing. config: the one that Megatron's schedule reads."""

    def __init__(self, level: int, config: TransformerConfig) -> None:
        self._timers = Timers(level, "max")
        self._levels = {name: of_timer for name, of_timer in _LEVELS.items() if of_timer <= level}
        config.timers = self._timers if level else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times what happens in the block. To be entered by every rank where the timer is of level 1."""
        if name not in self._levels:
            yield
            return
        timer = self._timers(name, log_level=_LEVELS[name])
        timer.start(barrier=_LEVELS[name] == 1)
        yield
        timer.stop()

    def each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """The items, with the time that each took to come."""
        while True:
            with self(name):
                try:
                    item = next(items)
                except StopIteration:
                    break
            yield item

    def seconds(self, *names: str) -> dict[str, float]:
        """`seconds/NAME` since the last reset, of the rank on which it was longest; those that no rank has timed are left out.

        One all-reduce over all ranks, none where no timer is of this level; to be called by all ranks.
        """
        asked = [name for name in names if name in self._levels]
        if not asked:
            return {}
        mine = [self._timers(name, log_level=_LEVELS[name]).elapsed(reset=False) for name in asked]
        longest = torch.tensor(mine, dtype=torch.float64, device=torch.cuda.current_device())
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        return {f"seconds/{name}": value for name, value in zip(asked, longest.tolist(), strict=True) if value > 0}

    def reset(self) -> None:
        """Sets every timer back to 0."""
        for name in self._levels:
            self._timers(name, log_level=_LEVELS[name]).reset()
