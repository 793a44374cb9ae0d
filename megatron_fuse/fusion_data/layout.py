"""Where fusion data lies, and what a recipe needs of it."""

from pathlib import Path
from typing import Any

from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import Artefact, Workspace, open_artefact
from megatron_fuse.target import target_hashes

TEXT_STAGE = "fusion_text"
TEACHER_STAGE = "fusion_teacher"
BUILT_BY = "tools/build_fusion_data.py"


def fusion_directory(recipe: Recipe) -> Path:
    alignment = recipe.alignment
    return Workspace(recipe.workdir).fusion(
        alignment.vocabulary_map, alignment.unmatched, recipe.loss.teacher_temperature
    )


def text_directory(recipe: Recipe) -> Path:
    return fusion_directory(recipe) / "text"


def teacher_directory(recipe: Recipe, source: str, mode: str) -> Path:
    return fusion_directory(recipe) / "teachers" / source / mode


def modes_with_teacher(recipe: Recipe) -> list[str]:
    """Modes whose captures training reads. The ground-truth text needs no source where no phase has a lambda for it (CSFT)."""
    training = any(phase.training.needs_teacher for phase in recipe.phases)
    return ["inference"] * recipe.uses_inference_mode + ["training"] * training


def text_options(recipe: Recipe) -> dict[str, int | str]:
    return {"seq_length": recipe.training.seq_length, "supervise": recipe.data.supervise}


def teacher_options(recipe: Recipe, mode: str) -> dict[str, Any]:
    return {
        "mode": mode,
        "vocabulary_map": recipe.alignment.vocabulary_map,
        "unmatched": recipe.alignment.unmatched,
        "temperature": recipe.loss.teacher_temperature,
        "entries_per_row": recipe.capture.top_k + 1,  # the label's own mass may add one
    }


def open_text(recipe: Recipe) -> Artefact:
    """The finished text. Raises UserError where it is missing or was tokenized for another target than the recipe's."""
    return open_artefact(
        text_directory(recipe),
        TEXT_STAGE,
        BUILT_BY,
        options=text_options(recipe),
        inputs=target_hashes(load_format(recipe.target, "target")),
        remove=fusion_directory(recipe),
    )


def open_teacher(recipe: Recipe, source: str, mode: str) -> Artefact:
    """One source's finished rows. Raises UserError where they are missing or were made in another way."""
    options = teacher_options(recipe, mode)
    return open_artefact(teacher_directory(recipe, source, mode), TEACHER_STAGE, BUILT_BY, options=options)
