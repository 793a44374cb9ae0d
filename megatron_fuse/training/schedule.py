"""The examples of each step, and the phase that gives their weights: a pure function of consumed samples.

A sample is one example. In a phase with two modes both documents of an example go into the same step. A phase
is a whole number of steps: a batch may cross from one epoch to the next within a phase, but never into
another phase. So the last batch of a phase may be short.

The order of an epoch is a random permutation from seed and epoch. A curriculum sorts it by the examples'
ranks (selection/curriculum.py); examples of equal rank keep their random order.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Phase, Recipe


@dataclass(frozen=True)
class Step:
    """One step of the schedule. `iteration` counts from 0."""

    iteration: int
    phase_index: int
    phase: Phase
    examples: np.ndarray  # [<= global_batch_size] positions among the training examples, 0 to n - 1
    consumed_samples: int  # after this step
    progress: float  # of the phase: 0 at its first step, 1 at its last
    ends_phase: bool


@dataclass(frozen=True, eq=False)
class Schedule:
    """The phases over `examples` training examples, in batches of global_batch_size examples.

    ranks [examples]: examples of lower rank come first in every epoch. None: the order is random.
    """

    phases: tuple[Phase, ...]
    examples: int
    global_batch_size: int
    seed: int
    ranks: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.examples == 0:
            raise UserError(
                "the fusion data hold no training example. See the counts in the manifest.json of the "
                "instructions."
            )

    def phase_samples(self, index: int) -> int:
        """The samples of a phase: at least one."""
        return max(round(self.phases[index].epochs * self.examples), 1)

    def _phase_steps(self, index: int) -> int:
        return -(-self.phase_samples(index) // self.global_batch_size)

    @property
    def total_steps(self) -> int:
        return sum(self._phase_steps(index) for index in range(len(self.phases)))

    @property
    def total_samples(self) -> int:
        return sum(self.phase_samples(index) for index in range(len(self.phases)))

    def last_step(self, train_iters: int | None) -> int:
        """The number of steps after which a run ends: all of them, or train_iters if that is less."""
        return min(self.total_steps, train_iters or self.total_steps)

    def step(self, consumed_samples: int) -> Step | None:
        """The step that starts after so many samples, None at the end of the schedule.

        Raises UserError if no step starts there, for example after a run with another batch size or other
        data.
        """
        first, iteration = 0, 0
        for index, phase in enumerate(self.phases):
            samples = self.phase_samples(index)
            position = consumed_samples - first
            if position < samples:
                if position % self.global_batch_size:
                    raise UserError(
                        f"the checkpoint has consumed {consumed_samples} samples, but no step of this "
                        "schedule begins there. Continue with the data and the --global-batch-size (now "
                        f"{self.global_batch_size}) of the first run."
                    )
                last = min(position + self.global_batch_size, samples)
                number = position // self.global_batch_size
                return Step(
                    iteration=iteration + number,
                    phase_index=index,
                    phase=phase,
                    examples=self._examples(index, position, last),
                    consumed_samples=first + last,
                    progress=number / max(self._phase_steps(index) - 1, 1),
                    ends_phase=last == samples,
                )
            first += samples
            iteration += self._phase_steps(index)
        return None

    def _examples(self, phase_index: int, first: int, last: int) -> np.ndarray:
        """Positions first ... last - 1 of a phase, counted over its epochs,
        as positions among the training examples."""
        # Epochs are counted over all phases, so that no two of them have the same order. A part of an epoch
        # counts as one.
        earlier_epochs = sum(math.ceil(phase.epochs) for phase in self.phases[:phase_index])
        picked = []
        for epoch in range(first // self.examples, -(-last // self.examples)):
            order = _epoch_order(self, earlier_epochs + epoch)
            start = epoch * self.examples
            picked.append(order[max(first - start, 0) : last - start])
        return np.concatenate(picked)


def make_schedule(recipe: Recipe, examples: int, *, ranks: np.ndarray | None = None) -> Schedule:
    """The recipe's schedule over so many training examples. ranks: see Schedule."""
    return Schedule(
        tuple(recipe.phases), examples, recipe.training.global_batch_size, recipe.training_seed, ranks
    )


@functools.lru_cache(maxsize=2)  # a step that crosses from one epoch to the next reads both
def _epoch_order(schedule: Schedule, epoch: int) -> np.ndarray:
    """[examples]: the positions among the training examples, in the order of an epoch.
    epoch: counted over all phases."""
    drawn = np.random.default_rng([schedule.seed, epoch]).permutation(schedule.examples)
    return drawn if schedule.ranks is None else drawn[np.argsort(schedule.ranks[drawn], kind="stable")]
