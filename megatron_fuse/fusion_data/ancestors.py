"""What fusion data comes from, against a recipe that may have been edited since."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_fuse.advantage import scores
from megatron_fuse.capture import stage as capture
from megatron_fuse.fusion_data.layout import modes_with_teacher
from megatron_fuse.instructions import prepare as instructions
from megatron_fuse.recipe import REFERENCE, Recipe
from megatron_fuse.responses import stage as responses
from megatron_fuse.storage import Workspace, open_artefact


def refuse_changed_recipe(recipe: Recipe) -> None:
    """Raises UserError if instructions, answers, captures or scores in the workdir were made with other options than the recipe has.

    For training, which may run where only the fusion data is: what is not there is not asked for, nor are tokenizers and weights,
    which the data stages compare.
    """
    for directory, stage, command, options in _ancestors(recipe):
        if (directory / "manifest.json").exists():
            open_artefact(directory, stage, command, options=options)


def _ancestors(recipe: Recipe) -> Iterator[tuple[Path, str, str, dict[str, Any]]]:
    """(directory, stage, command, options) of all that the recipe's fusion data is made from."""
    workspace = Workspace(recipe.workdir)
    yield workspace.instructions, instructions.STAGE, instructions.COMMAND, instructions.instructions_options(recipe)
    for name in recipe.answering:
        yield workspace.responses(name), responses.STAGE, responses.COMMAND, responses.responses_options(recipe, name)
    for name, scorers in recipe.scorers.items():
        for scorer in scorers:
            if scorer != REFERENCE:
                options = scores.scores_options(recipe, scorer)
                yield workspace.scores(name, scorer), scores.STAGE, scores.COMMAND, options
    for mode in modes_with_teacher(recipe):
        for source in recipe.sources:
            options = capture.capture_options(recipe, source, mode)
            yield workspace.captures(source, mode), capture.STAGE, capture.COMMAND, options
