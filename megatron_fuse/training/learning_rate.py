"""The learning rate of every step: a linear warm-up, then one of Megatron-core's decays.

A pure function of the iteration.

After the warm-up the values are those of Megatron-core's OptimizerParamScheduler, which has a counter as its
state instead. In a warm-up of w steps the first step has lr / w and the last has lr. Megatron's first step
has 0, so that it learns nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.training_options import TrainingOptions

# The share of lr - min_lr that is left when a share `done` of the decay is done: 1 at 0, 0 at 1.
_LEFT: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: 2.0 * 0.5**done - 1.0,
    "minus_sqrt": lambda done: 1.0 - math.sqrt(done),
}


@dataclass(frozen=True)
class LearningRate:
    """Rises to `lr` in `warmup` steps, falls from step `decay_from` to `min_lr` at step `decay_to`, and stays
    there.

    warmup and decay_from may be fractional if the recipe gives the warm-up as a fraction. decay: a key of
    _LEFT; None: stay at lr.
    """

    lr: float
    min_lr: float
    warmup: float
    decay_from: float
    decay_to: int
    decay: str | None

    def at(self, iteration: int) -> float:
        """The learning rate of the step that follows `iteration` steps."""
        if iteration + 1 <= self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        if self.decay is None:
            return self.lr
        passed = max(iteration - self.decay_from, 0)
        done = passed / (self.decay_to - self.decay_from) if iteration < self.decay_to else 1.0
        return self.min_lr + (self.lr - self.min_lr) * _LEFT[self.decay](done)

    def __str__(self) -> str:
        rise = (
            f"{self.lr:g} after a warm-up of {self.warmup:g} steps"
            if self.warmup
            else f"{self.lr:g} without warm-up"
        )
        if self.decay is None:
            return f"{rise}, then constant"
        return (
            f"{rise}, {self.decay} to {self.min_lr:g} from step {self.decay_from:g} to step {self.decay_to}"
        )


def make_learning_rate(options: TrainingOptions, total_steps: int) -> LearningRate:
    """The learning rate of a schedule of so many steps. Raises UserError if WSD's warm-up and decay do not
    fit into it."""
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
