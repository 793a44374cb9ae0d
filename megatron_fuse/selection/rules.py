"""The rules that choose a source for each example:
pure functions of the losses, scores and answers of all sources.

Legend: n examples, S sources in the recipe's order, R reward models. Results are int16 [n]: the index of the
source with the advantage, NONE if no source has it.
"""

from collections.abc import Sequence

import numpy as np

NONE = -1


def able_readers(ce: np.ndarray, lossy: np.ndarray) -> np.ndarray:
    """bool [n, S]: the sources whose cross-entropies over a response are compared.

    ce float [n, S]: NaN if a source has none, infinite if it overflowed; such a source never competes.
    lossy bool [n, S]: the source's tokens do not spell the whole response, so that its cross-entropy is too
        low (unknown characters cost too little). Lossy sources are compared only with each other, and only if
        no source has read the whole response.
    """
    finite = np.isfinite(ce)
    whole = finite & ~lossy
    return np.where(whole.any(1, keepdims=True), whole, finite)


def min_ce(
    ce: np.ndarray,
    lossy: np.ndarray,
    *,
    response_bytes: np.ndarray,
    response_tokens: np.ndarray,
    rule: str = "sum",
) -> np.ndarray:
    """The source that predicts the ground truth best:
    the least cross-entropy (arXiv 2408.04998, equations 1 and 2).

    ce float [n, S]: nats over the response's bytes, without the stop token.
    lossy bool [n, S]: see able_readers.
    response_bytes [n].
    response_tokens [n, S]: the response's tokens by each source's tokenizer.
    rule: `sum`; `per_byte` divides by the same number of bytes for all sources, so that the choice is that of
        `sum`; `per_token` (FuseLLM's choice) divides by the source's own number of tokens, which favours
        tokenizers with small tokens.

    Ties go to the first source. Raises ValueError for another rule.
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
    """The weight of each source's distribution in the mixture, float64 [n, S]: 1 / CE, divided by the sum
    over the sources.

    A source that does not compete has weight 0; all weights of an example are 0 if no source competes. ce,
    lossy [n, S]: see able_readers. FuseLLM's AvgCE (arXiv 2401.10491, section 3.2) weighs by the
    cross-entropies and does not say how. The inverse does not depend on the unit: nats of the response and
    nats per byte give the same weights.
    """
    able = able_readers(ce, lossy)
    # The bounds keep a source with a cross-entropy of 0, and an example without competing sources, from a
    # division by 0.
    inverse = np.where(able, 1 / np.maximum(np.where(able, ce, 1), 1e-6), 0)
    return inverse / np.maximum(inverse.sum(1, keepdims=True), 1e-12)


def random_source(able: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """One of the able sources, each with the same probability:
    a control for the other rules. able bool [n, S]."""
    drawn = np.where(able, np.random.default_rng(seed).random(able.shape), -1)
    return np.where(able.any(1), drawn.argmax(1), NONE).astype(np.int16)


def able_answers(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """bool [n, S]: the answers that can win. They are not empty, and every reward model has scored them.

    scores float [n, S, R]: NaN if an answer has no score.
    answers int [n, S]: equal numbers for identical texts, 0 for an empty or missing answer.
    """
    return (answers != 0) & ~np.isnan(scores).any(2)


def majority_vote(
    scores: np.ndarray, answers: np.ndarray, strongest: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The answer with most votes of the reward models, and the votes of all answers.

    scores float [n, S, R] and answers int [n, S]: see able_answers.
    strongest: index of the reward model whose score breaks ties.

    Every reward model votes for the answer that it scores highest. Identical texts are one answer: it has the
    best of their scores and all their votes, and the first source that gave it is its source. If several
    answers have most votes, the one that the strongest model scores highest wins, and of equal scores the
    first. Without reward models the first answer wins. Returns winner int16 [n] and votes int16 [n, S], the
    votes of each source's answer.
    """
    able = able_answers(scores, answers)
    same = (answers[:, :, None] == answers[:, None, :]) & able[:, :, None] & able[:, None, :]  # [n, S, S]
    # If two sources gave the same answer, both get the same best score, so that argmax finds the first.
    best = np.where(same[..., None], scores[:, None], -np.inf).max(2)  # [n, S, R]
    ballots = best.argmax(1)  # [n, R]
    # A vote for one of identical answers counts for each.
    votes = np.take_along_axis(same, ballots[:, None, :], 2).sum(2)
    tied = able & (votes == votes.max(1, keepdims=True))
    decider = best[..., strongest] if scores.shape[2] else np.zeros(able.shape)
    winner = np.where(tied, decider, -np.inf).argmax(1)
    return np.where(able.any(1), winner, NONE).astype(np.int16), votes.astype(np.int16)


def best_score(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The answer with the best score, int16 [n]: the vote of one reward model. scores float [n, S];
    answers: see able_answers."""
    return majority_vote(scores[..., None], answers)[0]


def category_scores(scores: np.ndarray, categories: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The mean score of each source in the category of each example, float64 [n, S], in standard deviations.

    scores float [n, S, R]: NaN if an answer has no score.
    categories int [n]: equal numbers for examples of one category.
    counted bool [n]: the examples whose scores count, in the means, the deviation and the lowest score. If a
        category has none, all its examples count.

    Reward models have different scales. So the scores of each model are first divided by their standard
    deviation over all answers. Then the mean over the models is taken. A missing score counts as the lowest
    that the model gave: a source gains nothing if it leaves out difficult examples.
    """
    means = np.zeros(scores.shape[:2])
    for model in np.moveaxis(scores.astype(np.float64), 2, 0):
        known = ~np.isnan(model)
        given = model[known & counted[:, None]] if (known & counted[:, None]).any() else model[known]
        if len(given) and given.std() > 0:
            means += np.where(np.isnan(model), given.min(), model) / given.std() / scores.shape[2]
    for category in np.unique(categories):
        rows = categories == category
        means[rows] = means[rows & counted if (rows & counted).any() else rows].mean(0)
    return means


def best_in_category(means: np.ndarray, able: np.ndarray) -> np.ndarray:
    """The able source with the best mean score in the example's category, int16 [n]. Ties go to the first.

    means float [n, S]: see category_scores. able bool [n, S].
    """
    return np.where(able.any(1), np.where(able, means, -np.inf).argmax(1), NONE).astype(np.int16)


def winner_if_able(winner: np.ndarray, able: np.ndarray) -> np.ndarray:
    """The winner of the answers as the source of the ground truth, int16 [n].

    NONE if no answer won, or if the winner has not read the ground truth.
    winner int [n]; able bool [n, S]: see able_readers.
    """
    reads = np.take_along_axis(able, np.maximum(winner, 0)[:, None].astype(np.int64), 1)[:, 0]
    return np.where((winner != NONE) & reads, winner, NONE).astype(np.int16)
