"""By how much a winner wins, and what an example that is barely won still counts. Pure functions, legend as in selection.py.

A margin is float32 [n]: infinite where nothing competes with the winner, NaN where nobody won.
"""

import numpy as np

from megatron_fuse.recipe import Margin
from megatron_fuse.selection.rules import NONE, able_answers, able_readers


def training_margin(ce: np.ndarray, lossy: np.ndarray, response_bytes: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Nats per byte of response that the winner's cross-entropy lies below the least of the others. Arguments as in min_ce.

    Under its rule per_token a source can win whose cross-entropy is not the least: its margin is negative.
    """
    nats = ce / np.maximum(response_bytes, 1)[:, None]
    return _lead(-nats, able_readers(ce, lossy), np.broadcast_to(np.arange(ce.shape[1]), ce.shape), source)


def score_margin(scores: np.ndarray, answers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """What the winner's answer scored above the next best different answer. scores float [n, S]; answers as in able_answers."""
    return _lead(scores.astype(np.float64), able_answers(scores[..., None], answers), answers, source)


def vote_margin(scores: np.ndarray, votes: np.ndarray, answers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Votes that the winner's answer has above the next best different answer; of a single judge, its score_margin.

    scores [n, S, R], answers [n, S] and votes [n, S] as in majority_vote.
    """
    if scores.shape[2] == 1:
        return score_margin(scores[..., 0], answers, source)
    return _lead(votes, able_answers(scores, answers), answers, source)


def _lead(values: np.ndarray, able: np.ndarray, answers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The best value of the winner's answer minus that of all others, among those who are able. values, able, answers [n, S]."""
    won = np.take_along_axis(answers, np.maximum(source, 0)[:, None].astype(np.int64), 1)  # [n, 1]
    own = np.where(able & (answers == won), values, -np.inf).max(1)
    other = np.where(able & (answers != won), values, -np.inf).max(1)
    return np.where(source == NONE, np.nan, own - np.where(source == NONE, 0, other)).astype(np.float32)


def example_weights(margin: np.ndarray, options: Margin | None) -> np.ndarray:
    """float32 [n]: options.weight where the margin is below options.at_least, else 1."""
    if options is None:
        return np.ones(len(margin), np.float32)
    return np.where(margin < options.at_least, options.weight, 1).astype(np.float32)
