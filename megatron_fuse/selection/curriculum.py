"""Curricula: measures by which the examples of an epoch can be ordered.

The ProFuser paper compares its model-centric curriculum with two data-centric ones (arXiv 2408.04998, Table
2). It names their measures, the length of the ground truth and the reward of the target's own answer, and
gives no more detail. Here `schedule.order` sorts the whole epoch, in every phase: from short to long, or from
the highest reward to the lowest. Either order goes from easy to hard. The examples of a batch then have about
the same length, or the same reward.

FUSION/curriculum-ORDER.safetensors    gt_tokens int32 [n]: labels of the ground truth in the target's tokens,
                                       with the stop
                                       token; 0: it does not fit
                                       target_reward float32 [n], if schedule.order needs it: the score that
                                       the strongest reward model gives to the target's own answer; NaN: it
                                       has no score

The header names the inputs of each array (array_file.py).
Every build writes the file anew, like the choice between sources.
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
from megatron_fuse.storage import Artifact, sha256_of_parts

FIX = f"Run {BUILT_BY} (if the documents are already built, this takes a second)."
GT_TOKENS, TARGET_REWARD = "gt_tokens", "target_reward"


@dataclass(frozen=True, eq=False)
class Curriculum:
    """The order of n examples.

    ranks int64 [n]: examples of lower rank come first, examples of equal rank in any order.
    sha256: hash of the ranks.
    """

    ranks: np.ndarray
    sha256: str


def curriculum_path(recipe: Recipe) -> Path:
    return fusion_directory(recipe) / f"curriculum-{recipe.schedule.order}.safetensors"


def _wanted(recipe: Recipe) -> str | None:
    """The name of the array that the recipe orders by, None if it shuffles."""
    return {"shuffled": None, "gt_length": GT_TOKENS, "target_reward": TARGET_REWARD}[recipe.schedule.order]


def _made_from(recipe: Recipe, text: str) -> dict[str, dict[str, Any]]:
    """The inputs of each array, as far as the recipe knows them. text: sha256 of the text's artifact."""
    made_from: dict[str, dict[str, Any]] = {GT_TOKENS: {"text": text}}
    if _wanted(recipe) == TARGET_REWARD:
        answers = recipe.target_as_source or TARGET
        made_from[TARGET_REWARD] = {"text": text, "answers": answers, "reward model": recipe.strongest}
    return made_from


def _parents(recipe: Recipe) -> dict[str, tuple[Stage, Key]]:
    parents: dict[str, tuple[Stage, Key]] = {"text": (TEXT, ())}
    if _wanted(recipe) == TARGET_REWARD:
        assert recipe.strongest is not None  # a recipe without reward models cannot say target_reward
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
    """The curriculum's arrays. gt_tokens int [n]: labels of each example's text.

    Raises UserError if scores are missing.
    """
    recipe = context.recipe
    arrays = {GT_TOKENS: gt_tokens.astype(np.int32)}
    if _wanted(recipe) == TARGET_REWARD:
        assert recipe.strongest is not None  # a recipe without reward models cannot say target_reward
        arrays[TARGET_REWARD] = load_scores(context, recipe.target_as_source or TARGET, recipe.strongest)
    return arrays


def write_curriculum(context: Context, text: Artifact) -> dict[str, np.ndarray]:
    """Measures all examples, writes the arrays and returns them. Raises UserError if scores are missing."""
    arrays = measure(context, np.array([row.supervised_tokens for row in read_examples(text)]))
    write_arrays(curriculum_path(context.recipe), arrays, _made_from(context.recipe, text.sha256))
    return arrays


def read_measures(recipe: Recipe, text: str) -> dict[str, np.ndarray]:
    """The stored arrays that a build of this recipe writes. text: sha256 of the text's artifact.

    Raises UserError if they are missing or damaged, or if they were made for another recipe or other data.
    """
    path = curriculum_path(recipe)
    arrays, made_from = read_arrays(path, FIX)
    wanted = _made_from(recipe, text)
    for name, basis in wanted.items():
        if name not in arrays or name not in made_from:
            raise UserError(f"{path} has no {name}. {FIX}")
        for key, want in basis.items():
            if (have := made_from[name].get(key)) != want:
                raise UserError(
                    f"{path}: {name} was made with {key} = {have!r}, but now it is {want!r}. {FIX}"
                )
    return {name: arrays[name] for name in wanted}


def read_curriculum(recipe: Recipe, text: str) -> Curriculum | None:
    """The order of the examples, None if the recipe shuffles them. text and errors: as of read_measures."""
    wanted = _wanted(recipe)
    if wanted is None:
        return None
    values = read_measures(recipe, text)[wanted]
    return curriculum(values, highest_first=wanted == TARGET_REWARD)


def curriculum(values: np.ndarray, *, highest_first: bool) -> Curriculum:
    """The order by values [n]: the lowest first, or with highest_first the highest.

    NaN come last in either case.
    """
    # np.unique treats all NaN as equal and puts them after every other value.
    _, ranks = np.unique(-values if highest_first else values, return_inverse=True)
    ranks = ranks.astype(np.int64)
    return Curriculum(ranks, sha256_of_parts(ranks.tobytes()))
