"""Where fusion data lies, and what a recipe needs of it."""

from pathlib import Path

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import Artefact, Workspace

TEXT_STAGE = "fusion_text"
TEACHER_STAGE = "fusion_teacher"
BUILT_BY = "tools/build_fusion_data.py"
MATCHES = ("skip", "exact", "condition", "onehot")  # how a row was aligned; the stored code is the place in this list


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
    training = any(phase.training.weight > 0 and phase.training.lambda_ > 0 for phase in recipe.phases)
    return ["inference"] * recipe.uses_inference_mode + ["training"] * training


def target_hashes(target: ChatFormat) -> dict[str, str]:
    return {"target tokenizer": target.tokenizer.sha256, "target chat format": target.sha256}


def check_target(text: Artefact, recipe: Recipe) -> None:
    """Raises UserError where the text was tokenized for another target or length than the recipe's."""
    wanted = {**target_hashes(load_format(recipe.target, "target")), "seq_length": recipe.training.seq_length}
    found = text.manifest["inputs"] | text.manifest["options"]
    for key, want in wanted.items():
        if found.get(key) != want:
            raise UserError(
                f"{text.directory} was made with {key} {found.get(key)}, but the recipe has {want}: "
                f"remove {text.directory.parent} and run {BUILT_BY} again, or put the old value back"
            )
