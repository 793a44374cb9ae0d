"""Finds the recipe of fusion data from its directory, which holds a copy of the recipe that built it.

WORKDIR/fusion/MAP-UNMATCHED-T/recipe.yaml    every option written out, as of the last build
"""

import argparse

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY, fusion_directory
from megatron_fuse.recipe import Recipe, dump_recipe, recipe_from_arguments
from megatron_fuse.storage import temporary_then_rename

_NAME = "recipe.yaml"


def save_recipe(recipe: Recipe) -> None:
    """Leaves a copy of the recipe in its fusion directory."""
    with temporary_then_rename(fusion_directory(recipe) / _NAME) as temporary:
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")


def fusion_data_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of the arguments (cli/fusion_data_arguments.py): --recipe, or the copy in DIR.

    With DIR the workdir is the place where DIR lies now; all other options are those of the build. Raises
    UserError if there is neither DIR nor --recipe or both, if DIR holds no recipe,
    or if its recipe describes another directory.
    """
    directory = arguments.directory
    if (directory is None) == (arguments.recipe is None):
        raise UserError(
            "both or neither of DIR and --recipe are given. Give the fusion directory "
            "(WORKDIR/fusion/MAP-UNMATCHED-T) or --recipe."
        )
    if directory is not None:
        arguments.recipe = directory / _NAME
        arguments.workdir = str(directory.resolve().parent.parent)
        if not arguments.recipe.exists():
            raise UserError(
                f"{arguments.recipe} is missing. Name a directory WORKDIR/fusion/MAP-UNMATCHED-T that "
                f"{BUILT_BY} has built, or give --recipe."
            )
    recipe = recipe_from_arguments(arguments)
    if directory is not None and fusion_directory(recipe) != directory.resolve():
        raise UserError(
            f"{arguments.recipe} describes {fusion_directory(recipe).name}, not {directory.resolve().name}. "
            f"Run {BUILT_BY} again, or give --recipe."
        )
    return recipe
