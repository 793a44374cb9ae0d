"""The stages of the pipeline in order.

Each stage is declared in its own module; this is the only list of all stages.
"""

from dataclasses import dataclass

from megatron_fuse.capture import CAPTURES
from megatron_fuse.fusion_data.layout import TEACHERS, TEXT
from megatron_fuse.instructions import INSTRUCTIONS
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES
from megatron_fuse.scoring.reference_scores import REFERENCE_SCORES
from megatron_fuse.scoring.scores import SCORES
from megatron_fuse.selection.choice import SELECTION
from megatron_fuse.selection.curriculum import CURRICULUM
from megatron_fuse.stages import Amounts, Context, Key, Stage
from megatron_fuse.training.stage import EXPORT, TRAINING

STAGES = (
    INSTRUCTIONS,
    RESPONSES,
    SCORES,
    REFERENCE_SCORES,
    CAPTURES,
    TEXT,
    TEACHERS,
    SELECTION,
    CURRICULUM,
    TRAINING,
    EXPORT,
)


@dataclass(frozen=True)
class Work:
    """One artifact that a recipe needs."""

    stage: Stage
    key: Key

    def label(self, recipe: Recipe) -> str:
        return self.stage.label(recipe, *self.key)

    def state(self, context: Context) -> str:
        """The state as Context.state gives it. Raises UserError as Context.state does."""
        return context.state(self.stage, *self.key)

    def flops(self, context: Context, amounts: Amounts) -> float:
        """Floating-point operations that make the whole artifact."""
        return self.stage.flops(context, amounts, *self.key)

    def disk(self, recipe: Recipe, amounts: Amounts) -> float:
        """Bytes on disk of the whole artifact."""
        return self.stage.disk(recipe, amounts, *self.key)


def steps(recipe: Recipe, until: str | None = None) -> dict[str, list[Work]]:
    """The steps of a recipe in order, one command each: name of the step -> artifacts of the command.

    Steps without artifacts are left out. until: the last step, None for all. Raises ValueError if the recipe
    has no such step.
    """
    works: dict[str, list[Work]] = {}
    for stage in STAGES:
        for key in stage.keys(recipe):
            works.setdefault(stage.name, []).append(Work(stage, key))
    names = list(works)
    return works if until is None else {name: works[name] for name in names[: names.index(until) + 1]}
