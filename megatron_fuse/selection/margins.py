"""Margins: by how much the winner leads, and the weight of an example with a small margin. Pure functions,
legend as in rules.py.

A margin is float32 [n]: infinite if nothing competes with the winner, NaN if there is no winner.
"""

import numpy as np

from megatron_fuse.recipe import Margin
from megatron_fuse.selection.rules import NONE, able_answers, able_readers


def training_margin(
    ce: np.ndarray, lossy: np.ndarray, response_bytes: np.ndarray, source: np.ndarray
) -> np.ndarray:
    """How far the winner's cross-entropy lies below the least of the others, in nats per byte of response.
    Arguments as in min_ce.

    By the rule per_token a source can win whose cross-entropy is not the least. Then the margin is negative.
    """
    nats = ce / np.maximum(response_bytes, 1)[:, None]
    return _lead(-nats, able_readers(ce, lossy), np.broadcast_to(np.arange(ce.shape[1]), ce.shape), source)


def score_margin(scores: np.ndarray, answers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The score of the winner's answer minus that of the next best different answer. scores float [n, S];
    answers: see able_answers."""
    return _lead(scores.astype(np.float64), able_answers(scores[..., None], answers), answers, source)


def vote_margin(scores: np.ndarray, votes: np.ndarray, answers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The votes of the winner's answer minus those of the next best different answer.

    With one reward model: the score_margin.

    scores [n, S, R], answers [n, S] and votes [n, S]: see majority_vote.
    """
    if scores.shape[2] == 1:
        return score_margin(scores[..., 0], answers, source)
    return _lead(votes, able_answers(scores, answers), answers, source)


def category_margin(means: np.ndarray, able: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The mean score of the winner in the example's category minus that of the next best able source.

    The unit is one standard deviation of the scores. means float [n, S]: see category_scores. able [n, S].
    """
    return _lead(means, able, np.broadcast_to(np.arange(means.shape[1]), means.shape), source)


def _lead(values: np.ndarray, able: np.ndarray, answers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The best value of the winner's answer minus the best value of the other answers, among able ones.

    values, able, answers [n, S]; source [n].
    """
    # NONE is -1: such rows take source 0 as an index, and become NaN at the end.
    won = np.take_along_axis(answers, np.maximum(source, 0)[:, None].astype(np.int64), 1)  # [n, 1]
    winner_value = np.where(able & (answers == won), values, -np.inf).max(1)
    other_value = np.where(able & (answers != won), values, -np.inf).max(1)
    # Without a winner both values may be -inf: (-inf) - (-inf) would warn.
    lead = winner_value - np.where(source == NONE, 0, other_value)
    return np.where(source == NONE, np.nan, lead).astype(np.float32)


def example_weights(margin: np.ndarray, options: Margin | None) -> np.ndarray:
    """float32 [n]: options.weight if the margin is below options.at_least, else 1. Without options 1."""
    if options is None:
        return np.ones(len(margin), np.float32)
    return np.where(margin < options.at_least, options.weight, 1).astype(np.float32)
