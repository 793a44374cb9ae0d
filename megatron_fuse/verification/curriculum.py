"""Checks the values that order the examples against the lengths and rewards that they were measured from."""

from collections.abc import Iterator, Mapping

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.selection.curriculum import FIX, GT_TOKENS, curriculum_path, measure, read_measures
from megatron_fuse.stages import Context
from megatron_fuse.verification.recomputed import difference_problems


def curriculum_problems(context: Context, text: str, listed: np.ndarray, names: list[str]) -> Iterator[str]:
    """One line for every problem of the stored curriculum.

    text: sha256 of the text's artifact. listed int64 [n]: supervised tokens of its examples. names [n]: their
    ids.
    """
    recipe = context.recipe
    path = curriculum_path(recipe)
    try:
        stored = read_measures(recipe, text)
    except UserError as error:
        yield str(error)
        return
    wanted = _measured(context, listed)
    yield from difference_problems(path, stored, wanted, names, basis="the texts and scores", fix=FIX)


def _measured(context: Context, listed: np.ndarray) -> Mapping[str, np.ndarray]:
    """The values measured again from the scores; if these are missing or damaged, the lengths alone.

    The check of the artifacts reports the damage itself.
    """
    try:
        return measure(context, listed)
    except (UserError, OSError, ValueError, EOFError):
        return {GT_TOKENS: listed}
