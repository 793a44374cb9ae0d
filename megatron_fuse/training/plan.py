"""The step plan: steps, samples, tokens and FLOPs of every phase, from the index alone,
before any document is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.training.batches import phase_weights
from megatron_fuse.training.schedule import Schedule
from megatron_fuse.training.throughput import training_flops


@dataclass(frozen=True)
class PhasePlan:
    """One phase. Sums are over all its steps and ranks."""

    name: str
    first_iteration: int  # steps done before the phase
    last_iteration: int  # steps done at its end
    samples: int  # examples, each counted once per epoch
    tokens: int  # input positions that carry a token
    supervised_tokens: dict[str, int]  # by mode
    flops: float  # model FLOPs (throughput.py)

    @property
    def steps(self) -> int:
        return self.last_iteration - self.first_iteration


def plan_phases(
    schedule: Schedule, dataset: FusionDataset, architecture: Architecture
) -> tuple[PhasePlan, ...]:
    """The plan of every phase of a schedule."""
    plans, samples = [], 0
    for index, phase in enumerate(schedule.phases):
        begins = schedule.step(samples)
        assert begins is not None
        phase_samples = schedule.phase_samples(index)
        samples += phase_samples
        epochs = phase_samples / schedule.examples
        follows = schedule.step(samples)
        modes = phase_weights(phase, progress=0.0, kl_factor=1.0)
        lengths = {mode: dataset.lengths(mode)[dataset.train] for mode in modes}
        positions = np.concatenate([length[length > 0] - 1 for length in lengths.values()])
        plans.append(
            PhasePlan(
                name=phase.name,
                first_iteration=begins.iteration,
                last_iteration=follows.iteration if follows else schedule.total_steps,
                samples=phase_samples,
                tokens=round(epochs * int(positions.sum())),
                supervised_tokens={
                    mode: round(epochs * int(dataset.supervised_tokens(mode)[dataset.train].sum()))
                    for mode in modes
                },
                flops=epochs * training_flops(architecture, positions),
            )
        )
    return tuple(plans)


def tokens_left(plans: Sequence[PhasePlan], iteration: int) -> tuple[float, float]:
    """Tokens that remain after `iteration` steps:
    to the end of the next step's phase, and to the end of the run.

    This assumes that all steps of a phase have equally many tokens. Different phases may have different
    numbers: a phase with two modes reads two documents per example.
    """
    left = [
        plan.tokens * (plan.last_iteration - max(iteration, plan.first_iteration)) / plan.steps
        for plan in plans
        if plan.last_iteration > iteration
    ]
    return (left[0] if left else 0.0), sum(left)
