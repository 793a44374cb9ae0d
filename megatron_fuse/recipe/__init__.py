"""The options of a recipe, how a recipe is read, and the paper's schedules by name."""

from megatron_fuse.recipe.checking import checked, checked_value, make_recipe
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
    RewardServerOptions,
    ScoreFile,
    ServerAddress,
    ServerOptions,
    SourceOptions,
)
from megatron_fuse.recipe.modes import MODES, Mode
from megatron_fuse.recipe.options import Recipe
from megatron_fuse.recipe.presets import PRESETS, ModeWeights, Phase, Ramp, value_at
from megatron_fuse.recipe.renamed import renamed, with_new_names
from megatron_fuse.recipe.stage_options import Margin, ReferenceOptions
from megatron_fuse.recipe.values import Line, Name, Options, path_argument, user_path
from megatron_fuse.recipe.yaml_files import Document, Keys, read_document

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
    "RewardServerOptions",
    "ScoreFile",
    "ServerAddress",
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
    "recipe_from_arguments",
    "renamed",
    "user_path",
    "value_at",
    "with_new_names",
]
