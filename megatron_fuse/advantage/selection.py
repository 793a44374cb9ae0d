"""Which source has the advantage on each example: pure functions of the losses, scores and answers of all sources.

Legend: n examples, S sources in the recipe's order, R reward models. Results are int16 [n]: the place of a source, NONE where no
source has one.
"""

import numpy as np

NONE = -1


def min_ce(ce: np.ndarray, response_bytes: np.ndarray, rule: str = "sum") -> np.ndarray:
    """The source that understands the ground truth best: the least cross-entropy (arXiv 2408.04998, equations 1 and 2).

    ce float [n, S]: nats over the response's bytes, the stop token left out; NaN where a source has none. response_bytes [n].
    rule: `sum`, or `per_byte`, which divides by the same bytes for all sources, so that tokenizers stay comparable and only the
    reported value changes. Ties go to the first source.
    """
    if rule not in ("sum", "per_byte"):
        raise ValueError(f"rule {rule!r} is neither sum nor per_byte")
    values = np.where(np.isfinite(ce), ce, np.inf)
    if rule == "per_byte":
        values = values / np.maximum(response_bytes, 1)[:, None]
    return np.where(np.isfinite(values).any(1), values.argmin(1), NONE).astype(np.int16)


def majority_vote(scores: np.ndarray, answers: np.ndarray, strongest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The answer that most reward models like best, and the votes of all.

    scores float [n, S, R], NaN where an answer was not judged; answers int [n, S]: equal numbers for identical texts, 0 for an
    empty or missing one; strongest: place of the reward model whose score breaks ties.

    Every reward model votes for its best answer. Identical texts are one answer, which has the best of their scores and all their
    votes, and is won by the first source that gave it. Of several answers with most votes, the one with the strongest model's best
    score wins, then the first. An answer that is empty or that any model has not judged cannot win; without reward models the
    first answer does. Returns winner int16 [n] and votes int16 [n, S], the votes of the source's answer.
    """
    examples, sources, models = scores.shape
    able = (answers != 0) & ~np.isnan(scores).any(2)  # [n, S]
    same = (answers[:, :, None] == answers[:, None, :]) & able[:, :, None] & able[:, None, :]  # [n, S, S]
    # Of an answer given twice both places get the same best score, so that argmax finds the first.
    merged = np.where(same[..., None], scores[:, None], -np.inf).max(2, initial=-np.inf)  # [n, S, R]
    ballots = merged.argmax(1)  # [n, R]
    first = np.where(able, same.argmax(2), np.arange(sources))  # [n, S]: the first source with the same answer
    own = (ballots[:, None, :] == np.arange(sources)[:, None]).sum(2) * able  # [n, S], all at the first of equals
    votes = np.take_along_axis(own, first, 1) * able
    tied = able & (votes == votes.max(1, where=able, initial=0)[:, None])
    decider = merged[..., strongest] if models else np.zeros((examples, sources))
    # Only a judged answer takes part: its decider is finite and above the -inf of the others.
    winner = np.where(tied, decider, -np.inf).argmax(1)
    return np.where(able.any(1), winner, NONE).astype(np.int16), votes.astype(np.int16)
