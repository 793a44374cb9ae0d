"""The options of a recipe, how a recipe is read, and the paper's schedules by name."""

from megatron_fuse.recipe.checking import Keys, checked, checked_value, make_recipe
from megatron_fuse.recipe.loading import (
    add_recipe_arguments,
    dump_recipe,
    load_recipe,
    read_recipe,
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
from megatron_fuse.recipe.modes import MODES, Mode
from megatron_fuse.recipe.options import Margin, Recipe, ReferenceOptions
from megatron_fuse.recipe.presets import PRESETS, ModeWeights, Phase, Ramp, value_at
from megatron_fuse.recipe.values import Line, Name, Options, path_argument, user_path
from megatron_fuse.recipe.yaml_files import Document, read_document, read_yaml

__all__ = [
    "MODES",
    "PRESETS",
    "REFERENCE",
    "TARGET",
    "AnsweringOptions",
    "Document",
    "Keys",
    "Line",
    "Margin",
    "Mode",
    "ModeWeights",
    "ModelOptions",
    "Name",
    "Options",
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
    "checked_value",
    "dump_recipe",
    "load_recipe",
    "make_recipe",
    "path_argument",
    "read_document",
    "read_recipe",
    "read_yaml",
    "recipe_from_arguments",
    "user_path",
    "value_at",
]
