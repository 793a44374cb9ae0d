"""Builds fusion data: the text once, every source's rows, then the choice between the sources and the measures of a curriculum."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_fuse.fusion_data.curriculum import write_curriculum
from megatron_fuse.fusion_data.directory import save_recipe
from megatron_fuse.fusion_data.layout import fusion_directory, modes_with_teacher, teacher_directory, text_directory
from megatron_fuse.fusion_data.selection import Selection, select
from megatron_fuse.fusion_data.teachers import build_teacher
from megatron_fuse.fusion_data.text import build_text
from megatron_fuse.instructions import require_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import Artefact, remove_abandoned
from megatron_fuse.text_safety import say

_WAIT = 0.2  # seconds between looks at what other ranks have done


def build_fusion_data(recipe: Recipe, progress: Callable[[str], None] = say) -> dict[str, Selection]:
    """Builds what is missing, chooses and measures anew; returns the choice by mode. A second run only chooses and measures.

    Under torchrun the ranks share the shards of every part and wait for each other between parts. Raises UserError where a
    stage before is missing or does not fit the recipe.
    """
    target = load_format(recipe.target, "target")
    require_instructions(recipe, target)
    text = _together(text_directory(recipe), lambda: build_text(recipe, target, progress))
    selections = {}
    for mode in modes_with_teacher(recipe):
        teachers = {}
        for source in recipe.sources:
            directory = teacher_directory(recipe, source, mode)
            build = partial(build_teacher, recipe, source, mode, target, text, progress)
            teachers[source] = _together(directory, build)
        selections[mode] = select(recipe, mode, text, teachers)
    write_curriculum(recipe, text)
    save_recipe(recipe)
    fusion = fusion_directory(recipe)
    for directory in (fusion, fusion / "maps", fusion / "selection"):  # what is no artefact
        remove_abandoned(directory)
    return selections


def _together(directory: Path, build: Callable[[], Artefact | None]) -> Artefact:
    """Does this rank's share, then waits until the other ranks have done theirs."""
    while (artefact := build()) is None:
        time.sleep(_WAIT)  # a damaged shard may be made again under the manifest that is still there
        while not (directory / "manifest.json").exists():
            time.sleep(_WAIT)
    return artefact
