"""The learning rate of every step: a linear warm-up, then one of Megatron-core's decays, a pure function of the iteration.

After the warm-up the values are those of Megatron-core's OptimizerParamScheduler, which keeps a count of its own instead. In the warm-up
the first of w steps has lr / w and the last has lr; Megatron's first has 0, and learns nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.options import TrainingOptions

# What is left of the way from lr to min_lr when so much of the decay is done: 1 at 0, 0 at 1.
_LEFT: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: 2.0 * 0.5**done - 1.0,
    "minus_sqrt": lambda done: 1.0 - math.sqrt(done),
}


@dataclass(frozen=True)
class LearningRate:
    """Up to `lr` in `warmup` steps, from step `decay_from` on down to `min_lr` at step `decay_to`, which it keeps.

    warmup and decay_from are no whole numbers where a fraction says how long the warm-up is. decay: a key of _LEFT; None: stay at lr.
    """

    lr: float
    min_lr: float
    warmup: float
    decay_from: float
    decay_to: int
    decay: str | None

    def at(self, iteration: int) -> float:
        """Of the step after `iteration` others."""
        if iteration + 1 <= self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        if self.decay is None:
            return self.lr
        passed = max(iteration - self.decay_from, 0)
        done = passed / (self.decay_to - self.decay_from) if iteration < self.decay_to else 1.0
        return self.min_lr + (self.lr - self.min_lr) * _LEFT[self.decay](done)

    def __str__(self) -> str:
        rise = (
            f"{self.lr:g} after a warm-up of {self.warmup:g} steps" if self.warmup else f"{self.lr:g} without warm-up"
        )
        if self.decay is None:
            return f"{rise}, then constant"
        return f"{rise}, {self.decay} to {self.min_lr:g} from step {self.decay_from:g} to step {self.decay_to}"


def make_learning_rate(options: TrainingOptions, total_steps: int) -> LearningRate:
    """That of a schedule of so many steps. Raises UserError where warm-up and decay of WSD do not fit into it."""
    decay_to = options.lr_decay_iters or total_steps
    warmup = options.warmup_steps(decay_to)
    decay: str | None
    decay_from, decay = warmup, None if options.lr_decay_style == "constant" else options.lr_decay_style
    if options.lr_wsd_decay_iters is not None:
        try:
            options.require_room_for_wsd(decay_to)
        except ValueError as error:
            raise UserError(f"training: the schedule has {total_steps} steps, and {error}") from error
        decay_from, decay = decay_to - options.lr_wsd_decay_iters, options.lr_wsd_decay_style
    return LearningRate(options.lr, options.min_lr, warmup, decay_from, decay_to, decay)
