"""The directories of fusion data and its two stages: text in the target's tokens, and the sources' rows."""

from pathlib import Path
from typing import Any

from megatron_fuse.capture import CAPTURES
from megatron_fuse.instructions import INSTRUCTIONS
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Amounts, Stage
from megatron_fuse.storage import Workspace

NAME = "fusion data"
BUILT_BY = "megatron-fuse build"


def fusion_directory(recipe: Recipe) -> Path:
    alignment = recipe.alignment
    return Workspace(recipe.workdir).fusion(
        alignment.vocabulary_map, alignment.unmatched, recipe.loss.teacher_temperature
    )


def _text_options(recipe: Recipe) -> dict[str, int | str | bool]:
    # spans: a text of an earlier version has none. This key then differs, and the error names the command
    # that rebuilds it.
    return {"seq_length": recipe.training.seq_length, "supervise": recipe.data.supervise, "spans": True}


def _teacher_options(recipe: Recipe, _: str, mode: str) -> dict[str, Any]:
    return {
        "mode": mode,
        "vocabulary_map": recipe.alignment.vocabulary_map,
        "unmatched": recipe.alignment.unmatched,
        "temperature": recipe.loss.teacher_temperature,
        "entries_per_row": recipe.capture.top_k + 1,  # the label mass may add one entry
    }


def _teacher_disk(recipe: Recipe, amounts: Amounts, _: str, mode: str) -> float:
    """Bytes on disk. On real text the default filter keeps about 6 of 10 entries."""
    return (4 * 0.6 * recipe.capture.top_k + 2) * amounts.learned(mode)


TEXT = Stage(
    name=NAME,
    recorded_as="fusion_text",
    command=BUILT_BY,
    keys=lambda _: [()],
    directory=lambda recipe: fusion_directory(recipe) / "text",
    options=_text_options,
    parents=lambda _: {"instructions": (INSTRUCTIONS, ())},
    formats=lambda context: context.target_hashes,
    disk=lambda _, amounts: 3 * amounts.read("training"),
    remove=fusion_directory,
)

# The rows of one source do not depend on the other sources: a further source leaves finished rows as they
# are.
TEACHERS = Stage(
    name=NAME,
    recorded_as="fusion_teacher",
    command=BUILT_BY,
    keys=lambda recipe: [(source, mode) for mode in recipe.modes_with_teacher for source in recipe.sources],
    directory=lambda recipe, source, mode: fusion_directory(recipe) / "teachers" / source / mode,
    options=_teacher_options,
    parents=lambda _, source, mode: {"capture": (CAPTURES, (source, mode)), "text": (TEXT, ())},
    formats=lambda context, *_: context.target_hashes,
    disk=_teacher_disk,
)
