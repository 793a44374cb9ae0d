"""Which source has the advantage on each example: pure functions of the losses, scores and answers of all sources.

Legend: n examples, S sources in the recipe's order, R reward models. Results are int16 [n]: the place of a source, NONE where no
source has one.
"""

from collections.abc import Sequence

import numpy as np

NONE = -1


def able_readers(ce: np.ndarray, lossy: np.ndarray) -> np.ndarray:
    """bool [n, S]: the sources whose cross-entropies over a response are compared.

    ce float [n, S]: NaN where a source has none, infinite where it overflowed: such a source never competes. lossy bool [n, S]:
    its tokens do not spell the whole response (unknown characters cost it too little), so that it is compared only with others
    of its kind, where no source has read it all.
    """
    finite = np.isfinite(ce)
    whole = finite & ~lossy
    return np.where(whole.any(1, keepdims=True), whole, finite)


def min_ce(
    ce: np.ndarray, lossy: np.ndarray, *, response_bytes: np.ndarray, response_tokens: np.ndarray, rule: str = "sum"
) -> np.ndarray:
    """The source that understands the ground truth best: the least cross-entropy (arXiv 2408.04998, equations 1 and 2).

    ce float [n, S]: nats over the response's bytes, the stop token left out; lossy bool [n, S]: see able_readers.
    response_bytes [n]; response_tokens [n, S]: its own tokens.
    rule: `sum`; `per_byte` divides by the same bytes for all sources, so that only the reported value changes; `per_token`
    (FuseLLM's choice) divides by the source's own number of tokens, which favours small pieces. Ties go to the first source.
    """
    divisors = {
        "sum": 1,
        "per_byte": np.maximum(response_bytes, 1)[:, None],
        "per_token": np.maximum(response_tokens, 1),
    }
    if rule not in divisors:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(divisors)}")
    able = able_readers(ce, lossy)
    values = np.where(able, ce, np.inf) / divisors[rule]
    return np.where(able.any(1), values.argmin(1), NONE).astype(np.int16)


def inverse_ce(ce: np.ndarray, lossy: np.ndarray) -> np.ndarray:
    """What each source's distribution weighs in their mixture, float64 [n, S]: 1 / CE brought to a sum of 1, 0 where it cannot read.

    FuseLLM's AvgCE (arXiv 2401.10491, section 3.2) weighs by the cross-entropies and leaves open how; the inverse does not depend
    on the unit, nats of the response or nats per byte. ce, lossy [n, S]: see able_readers. Rows of an example that no source can
    read are 0.
    """
    able = able_readers(ce, lossy)
    inverse = np.where(able, 1 / np.maximum(np.where(able, ce, 1), 1e-6), 0)
    return inverse / np.maximum(inverse.sum(1, keepdims=True), 1e-12)


def random_source(able: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """One of those who are able, each as likely as the others: a control for every rule. able bool [n, S]."""
    drawn = np.where(able, np.random.default_rng(seed).random(able.shape), -1)
    return np.where(able.any(1), drawn.argmax(1), NONE).astype(np.int16)


def able_answers(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """bool [n, S]: the answers that can win: neither empty nor left unjudged by anyone.

    scores float [n, S, R], NaN where an answer was not judged; answers int [n, S]: equal numbers for identical texts, 0 for an
    empty or missing one.
    """
    return (answers != 0) & ~np.isnan(scores).any(2)


def majority_vote(scores: np.ndarray, answers: np.ndarray, strongest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The answer that most reward models like best, and the votes of all.

    scores float [n, S, R] and answers int [n, S]: see able_answers; strongest: place of the reward model whose score breaks ties.

    Every reward model votes for its best answer. Identical texts are one answer, which has the best of their scores and all their
    votes, and is won by the first source that gave it. Of several answers with most votes, the one with the strongest model's best
    score wins, then the first. Without reward models the first answer does. Returns winner int16 [n] and votes int16 [n, S], the
    votes of the source's answer.
    """
    able = able_answers(scores, answers)
    same = (answers[:, :, None] == answers[:, None, :]) & able[:, :, None] & able[:, None, :]  # [n, S, S]
    # Of an answer given twice both places get the same best score, so that argmax finds the first.
    best = np.where(same[..., None], scores[:, None], -np.inf).max(2)  # [n, S, R]
    ballots = best.argmax(1)  # [n, R]
    votes = np.take_along_axis(same, ballots[:, None, :], 2).sum(2)  # a vote for one of equals is a vote for each
    tied = able & (votes == votes.max(1, keepdims=True))
    decider = best[..., strongest] if scores.shape[2] else np.zeros(able.shape)
    winner = np.where(tied, decider, -np.inf).argmax(1)
    return np.where(able.any(1), winner, NONE).astype(np.int16), votes.astype(np.int16)


def best_score(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The answer with the best score, int16 [n]: the vote of a single judge. scores float [n, S]; answers as in able_answers."""
    return majority_vote(scores[..., None], answers)[0]
