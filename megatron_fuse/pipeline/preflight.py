"""Checks the files and models of a recipe before anything runs, so that a missing file ends a run at once."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron_fuse.capture.megatron_layout import source_architecture
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.huggingface.reward_models import find_reward_model
from megatron_fuse.instructions.tables import table_bytes
from megatron_fuse.recipe import REFERENCE, Recipe
from megatron_fuse.scoring.reference_scores import require_measures
from megatron_fuse.target import check_target_weights, read_target


def check_files(recipe: Recipe) -> None:
    """Raises UserError, with all problems, if data, models or files of a recipe are missing.

    Then raises UserError if the target cannot be trained with the options of the recipe, or its weights are
    damaged.
    """
    problems = []
    for check in _checks(recipe):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n       ".join(problems))
    check_target_weights(read_target(recipe))


def _checks(recipe: Recipe) -> Iterator[Callable[[], object]]:
    """Checks of every file and model of the recipe, also of those that the schedule does not use.

    Each is a function that raises UserError if its file or model is missing.
    """
    yield partial(table_bytes, recipe.data.path)
    models = {"target": recipe.target} | {
        f"sources.{name}": options for name, options in recipe.sources.items()
    }
    for key, options in models.items():
        yield partial(resolve_model, options.model, f"{key}.model")
        if options.responses:
            yield partial(_require, options.responses.path, f"{key}.responses")
    for name, source in recipe.sources.items():
        if source.backend == "megatron":
            yield partial(source_architecture, recipe, name)
        for mode, path in source.captures.items():
            yield partial(_require, path, f"sources.{name}.captures.{mode}")
    for name, reward_model in recipe.reward_models.items():
        if reward_model.scores:
            yield partial(_require, reward_model.scores.path, f"reward_models.{name}.scores")
        else:
            yield partial(find_reward_model, reward_model, name)
    if recipe.reference.bertscore_model:
        yield partial(resolve_model, recipe.reference.bertscore_model, "reference.bertscore_model")
    if any(REFERENCE in scorers for scorers in recipe.scorers.values()):
        yield partial(require_measures, recipe.reference)


def _require(path: Path, key: str) -> None:
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist")
