"""The models of a recipe by their names."""

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.models import TARGET, AnsweringOptions, RewardModelOptions, SourceOptions
from megatron_fuse.recipe.options import Recipe


def recipe_key(name: str) -> str:
    """The key of a source, or of the target, in the recipe (`sources.mpt`, `target`), for errors."""
    return TARGET if name == TARGET else f"sources.{name}"


def answering_options(recipe: Recipe, name: str) -> AnsweringOptions:
    """The options of a source by its name, or of the target.

    Raises UserError with the names that the recipe has.
    """
    return recipe.target if name == TARGET else source_options(recipe, name)


def source_options(recipe: Recipe, source: str) -> SourceOptions:
    """The options of a source by its name. Raises UserError with the names that the recipe has."""
    if source not in recipe.sources:
        raise UserError(f"sources: there is no {source!r}. Choose one of {', '.join(recipe.sources)}.")
    return recipe.sources[source]


def reward_model_options(recipe: Recipe, name: str) -> RewardModelOptions:
    """The options of a reward model by its name. Raises UserError with the names that the recipe has."""
    if name not in recipe.reward_models:
        known = ", ".join(recipe.reward_models) or "none"
        raise UserError(f"reward_models: there is no {name!r}; the recipe has {known}")
    return recipe.reward_models[name]
