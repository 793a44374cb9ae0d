"""What an epoch's examples can be ordered by: the data-centric curricula beside which the ProFuser paper sets its own model-centric
one (arXiv 2408.04998, Table 2). It names the two measures, the length of the ground truth and the reward of the target's own answer,
and is silent on the rest; here `schedule.order` sorts the whole epoch, in every phase: from short to long, or from the best reward
to the least, which is from easy to hard either way. Batches are then of one length, or of one reward.

FUSION/curriculum-ORDER.safetensors    gt_tokens int32 [n]: labels of the ground truth, in the target's tokens, the stop token
                                       among them; 0: it does not fit
                                       target_reward float32 [n], where schedule.order asks for it: the strongest judge's score
                                       of the target's own answer; NaN: it cannot be judged

The header says of each array what it was made from (array_file.py). Like the choice between sources the file is written anew by
every build.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY, NAME, TEXT, fusion_directory
from megatron_fuse.fusion_data.listing import read_examples
from megatron_fuse.recipe import TARGET, Recipe
from megatron_fuse.scoring.scores import SCORES, load_scores
from megatron_fuse.selection.array_file import read_arrays, write_arrays
from megatron_fuse.stages import Context, Key, Stage
from megatron_fuse.storage import Artifact, sha256_of_bytes

FIX = f"run {BUILT_BY} (it takes a second where the documents are built)"
GT_TOKENS, TARGET_REWARD = "gt_tokens", "target_reward"


@dataclass(frozen=True, eq=False)
class Curriculum:
    """ranks int64 [n]: those of lower rank come first, equal ones in any order; sha256: of the ranks, which are all that counts."""

    ranks: np.ndarray
    sha256: str


def curriculum_path(recipe: Recipe) -> Path:
    return fusion_directory(recipe) / f"curriculum-{recipe.schedule.order}.safetensors"


def _wanted(recipe: Recipe) -> str | None:
    """The array that the recipe orders by; None: by none."""
    return {"shuffled": None, "gt_length": GT_TOKENS, "target_reward": TARGET_REWARD}[recipe.schedule.order]


def _made_from(recipe: Recipe, text: str) -> dict[str, dict[str, Any]]:
    """By array, what it is made from as far as the recipe knows it. text: sha256 of the text's artifact."""
    made_from: dict[str, dict[str, Any]] = {GT_TOKENS: {"text": text}}
    if _wanted(recipe) == TARGET_REWARD:
        answers = recipe.target_as_source or TARGET
        made_from[TARGET_REWARD] = {"text": text, "answers": answers, "reward model": recipe.strongest}
    return made_from


def _parents(recipe: Recipe) -> dict[str, tuple[Stage, Key]]:
    parents: dict[str, tuple[Stage, Key]] = {"text": (TEXT, ())}
    if _wanted(recipe) == TARGET_REWARD:
        assert recipe.strongest is not None  # a recipe without judges cannot say target_reward
        parents["reward"] = (SCORES, (recipe.target_as_source or TARGET, recipe.strongest))
    return parents


CURRICULUM = Stage(
    name=NAME,
    recorded_as="curriculum",
    command=BUILT_BY,
    keys=lambda _: [()],
    directory=curriculum_path,
    parents=_parents,
    state=lambda context: "done" if curriculum_path(context.recipe).exists() else "to do",
    always=True,
)


def measure(context: Context, gt_tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays. gt_tokens int [n]: labels of every example's text. Raises UserError where scores are missing."""
    recipe = context.recipe
    arrays = {GT_TOKENS: gt_tokens.astype(np.int32)}
    if _wanted(recipe) == TARGET_REWARD:
        assert recipe.strongest is not None  # a recipe without judges cannot say target_reward
        arrays[TARGET_REWARD] = load_scores(context, recipe.target_as_source or TARGET, recipe.strongest)
    return arrays


def write_curriculum(context: Context, text: Artifact) -> dict[str, np.ndarray]:
    """Measures all examples and writes the result, which it returns. Raises UserError where scores are missing."""
    arrays = measure(context, np.array([row.supervised_tokens for row in read_examples(text)]))
    write_arrays(curriculum_path(context.recipe), arrays, _made_from(context.recipe, text.sha256))
    return arrays


def read_measures(recipe: Recipe, text: str) -> dict[str, np.ndarray]:
    """The stored arrays that the recipe's own build writes. text: sha256 of the text's artifact.

    Raises UserError where there are none, where they are damaged, or where they were made for another recipe or other data.
    """
    path = curriculum_path(recipe)
    arrays, made_from = read_arrays(path, FIX)
    wanted = _made_from(recipe, text)
    for name, basis in wanted.items():
        if name not in arrays or name not in made_from:
            raise UserError(f"{path} has no {name}: {FIX}")
        for key, want in basis.items():
            if (have := made_from[name].get(key)) != want:
                raise UserError(f"{path}: {name} was made with {key} = {have!r}, but now it is {want!r}: {FIX}")
    return {name: arrays[name] for name in wanted}


def read_curriculum(recipe: Recipe, text: str) -> Curriculum | None:
    """The order of the examples; None where the recipe shuffles them. text, errors: as of read_measures."""
    wanted = _wanted(recipe)
    if wanted is None:
        return None
    values = read_measures(recipe, text)[wanted]
    return curriculum(values, highest_first=wanted == TARGET_REWARD)


def curriculum(values: np.ndarray, *, highest_first: bool) -> Curriculum:
    """values [n]: what examples are ordered by, the least first unless highest_first; NaN last in either case."""
    _, ranks = np.unique(-values if highest_first else values, return_inverse=True)  # NaN are equal, and after all else
    ranks = ranks.astype(np.int64)
    return Curriculum(ranks, sha256_of_bytes(ranks.tobytes()))
