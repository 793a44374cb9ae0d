"""Where a training writes, and where its export goes."""

from pathlib import Path

from megatron_fuse.recipe import Recipe
from megatron_fuse.storage import Workspace


def checkpoint_directory(recipe: Recipe) -> Path:
    """The directory in which training saves.

    It also continues from there, unless --load names another directory.
    """
    return recipe.training.save or Workspace(recipe.workdir).checkpoints


def metrics_directory(recipe: Recipe) -> Path:
    """WORKDIR/training, or the directory of --save if that is given,
    because several runs may share a workdir."""
    return recipe.training.save or Workspace(recipe.workdir).training


def export_directory(recipe: Recipe) -> Path:
    return recipe.export.path or Workspace(recipe.workdir).export
