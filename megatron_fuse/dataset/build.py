"""Builds fusion data: the text, the rows of every source, then the choice between the sources and the
measures of a curriculum."""

import time
from collections.abc import Callable
from functools import partial

from megatron_fuse.dataset.directory import save_recipe
from megatron_fuse.fusion_data.layout import TEACHERS, TEXT, fusion_directory
from megatron_fuse.fusion_data.teachers import build_teacher
from megatron_fuse.fusion_data.text import build_text
from megatron_fuse.selection.choice import Selection, select
from megatron_fuse.selection.curriculum import write_curriculum
from megatron_fuse.stages import Context, Stage
from megatron_fuse.storage import Artifact, remove_abandoned

_WAIT = 0.2  # seconds between looks at what other ranks have done


def build_fusion_data(context: Context) -> dict[str, Selection]:
    """Builds what is missing, then makes the selections and the curriculum anew.

    Returns the selection of each mode.

    If all documents are built already, only selections and curriculum are made. Under torchrun the ranks
    divide the shards of every part among them, and wait for each other between the parts. Raises UserError if
    an earlier stage is missing or does not fit the recipe.
    """
    recipe = context.recipe
    text = _together(context, TEXT, (), partial(build_text, context))
    selections = {}
    for mode in recipe.modes_with_teacher:
        teachers = {}
        for source in recipe.sources:
            build = partial(build_teacher, context, source, mode)
            teachers[source] = _together(context, TEACHERS, (source, mode), build)
        selections[mode] = select(context, mode, text, teachers)
    write_curriculum(context, text)
    save_recipe(recipe)
    fusion = fusion_directory(recipe)
    for directory in (fusion, fusion / "maps", fusion / "selection"):  # what is no artifact
        remove_abandoned(directory)
    return selections


def _together(
    context: Context, stage: Stage, key: tuple[str, ...], build: Callable[[], Artifact | None]
) -> Artifact:
    """Builds this rank's share of an artifact, then waits until the other ranks have built theirs."""
    manifest = stage.directory(context.recipe, *key) / "manifest.json"
    while (artifact := build()) is None:
        # Wait first: if a rank makes a damaged shard again, the old manifest is still there, and the inner
        # loop would not wait.
        time.sleep(_WAIT)
        while not manifest.exists():
            time.sleep(_WAIT)
    return artifact
