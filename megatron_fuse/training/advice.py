"""Warnings at the start of a run whose KL teaches less, or something else, than it seems to.

`loss_advice` needs the recipe alone, so that `megatron-fuse plan` prints it too. `stored_mass_advice` reads
the fusion data.
"""

import numpy as np

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.recipe import Recipe

_MOST_EXAMPLES = 256  # enough for a mean of all rows to a few per cent
_LEAST_MASS = 0.5


def loss_advice(recipe: Recipe) -> list[str]:
    """One line per option of the loss that moves the minimum of the KL away from a target that equals its
    source.

    At equality the gradient of the KL is 0 only with equal temperatures and the tail `bucket`. `renormalize`
    and `ignore` lower all of the target's mass outside the stored entries, whatever mass the source has there
    (kernels/README.md). Both only agree with `bucket` where no mass is outside. Empty if no phase has a KL.
    """
    if not any(mode.needs_teacher for phase in recipe.phases for mode in (phase.inference, phase.training)):
        return []
    loss, lines = recipe.loss, list[str]()
    teacher, student = loss.teacher_temperature, recipe.student_temperature
    if teacher != student:
        lines.append(
            f"loss.teacher_temperature is {teacher:g}, but loss.student_temperature is {student:g}: the KL "
            "is not least where the target equals its source, and changes a target that does. Set "
            f"loss.student_temperature to {teacher:g}."
        )
    if loss.tail != "bucket":
        lines.append(
            f"loss.tail is {loss.tail}: the KL is least where the target has no mass outside the stored "
            "entries, not where it equals its source. Set loss.tail to bucket."
        )
    return lines


def stored_mass_advice(recipe: Recipe, dataset: FusionDataset) -> list[str]:
    """One line per mode and source that teaches with less than half of its mass on average."""
    lines = []
    for mode in recipe.modes_with_teacher:
        for number, source in enumerate(dataset.sources):
            taught = dataset.train[dataset.winners(mode)[dataset.train] == number]
            share = stored_mass(dataset, mode, taught)
            if share is not None and share < _LEAST_MASS:
                lines.append(
                    f"source {source}, {mode} mode: only {share:.0%} of its mass at temperature "
                    f"{recipe.loss.teacher_temperature:g} is in the stored entries, on average. The KL says "
                    "little about the rest. Lower loss.teacher_temperature and capture.temperatures, or "
                    f"raise capture.top_k ({recipe.capture.top_k}) and capture.top_p "
                    f"({recipe.capture.top_p:g}), and capture again."
                )
    return lines


def stored_mass(dataset: FusionDataset, mode: str, examples: np.ndarray) -> float | None:
    """The mean mass of the stored entries, over all rows that have entries.

    examples [n]: of the dataset; of more than _MOST_EXAMPLES some are read, evenly spread. None without rows.
    """
    chosen = examples[:: max(-(-len(examples) // _MOST_EXAMPLES), 1)]
    mass, rows = 0.0, 0
    for example in chosen.tolist():
        document = dataset.document(mode, example)
        mass += float(np.exp(document.teacher_logprobs.astype(np.float64)).sum())
        rows += int(np.count_nonzero(document.counts))
    return mass / rows if rows else None
