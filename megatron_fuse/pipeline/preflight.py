"""What a recipe names is looked for before anything runs, so that a missing file ends a run at once and not after hours."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.huggingface.reward_models import find_reward_model
from megatron_fuse.instructions.tables import table_bytes
from megatron_fuse.recipe import REFERENCE, Recipe
from megatron_fuse.scoring.reference_scores import require_measures
from megatron_fuse.target import check_target_weights, read_target


def check_files(recipe: Recipe) -> None:
    """Refuses a recipe whose data, models or files are missing, all at once, or whose target cannot be trained as it says."""
    problems = []
    for check in _checks(recipe):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n       ".join(problems))
    check_target_weights(recipe, read_target(recipe))


def _checks(recipe: Recipe) -> Iterator[Callable[[], object]]:
    """Of all that the recipe names, whether or not its schedule uses it. What they call raises UserError for what is missing."""
    yield partial(table_bytes, recipe.data.path)
    models = {"target": recipe.target} | {f"sources.{name}": options for name, options in recipe.sources.items()}
    for key, options in models.items():
        yield partial(resolve_model, options.model, f"{key}.model")
        if options.responses:
            yield partial(_require, options.responses.path, f"{key}.responses")
    for name, source in recipe.sources.items():
        for mode, path in source.captures.items():
            yield partial(_require, path, f"sources.{name}.captures.{mode}")
    for name, judge in recipe.reward_models.items():
        if judge.scores:
            yield partial(_require, judge.scores.path, f"reward_models.{name}.scores")
        else:
            yield partial(find_reward_model, judge, name)
    if recipe.reference.bertscore_model:
        yield partial(resolve_model, recipe.reference.bertscore_model, "reference.bertscore_model")
    if any(REFERENCE in scorers for scorers in recipe.scorers.values()):
        yield partial(require_measures, recipe.reference)


def _require(path: Path, key: str) -> None:
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist")
