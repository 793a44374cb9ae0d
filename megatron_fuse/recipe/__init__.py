"""Options: what a recipe can say, how it is read, and the paper's schedules by name."""

from megatron_fuse.recipe.loading import (
    add_recipe_arguments,
    checked,
    dump_recipe,
    load_recipe,
    make_recipe,
    read_yaml,
    recipe_from_arguments,
)
from megatron_fuse.recipe.models import (
    REFERENCE,
    TARGET,
    AnsweringOptions,
    ModelOptions,
    ResponseFile,
    RewardModelOptions,
    ScoreFile,
    ServerOptions,
    SourceOptions,
)
from megatron_fuse.recipe.options import Margin, Recipe, ReferenceOptions
from megatron_fuse.recipe.presets import PRESETS, ModeWeights, Phase, Ramp, value_at

__all__ = [
    "PRESETS",
    "REFERENCE",
    "TARGET",
    "AnsweringOptions",
    "Margin",
    "ModeWeights",
    "ModelOptions",
    "Phase",
    "Ramp",
    "Recipe",
    "ReferenceOptions",
    "ResponseFile",
    "RewardModelOptions",
    "ScoreFile",
    "ServerOptions",
    "SourceOptions",
    "add_recipe_arguments",
    "checked",
    "dump_recipe",
    "load_recipe",
    "make_recipe",
    "read_yaml",
    "recipe_from_arguments",
    "value_at",
]
