"""Which source has the advantage on each example: pure functions of the losses, scores and answers of all sources.

Legend: n examples, S sources in the recipe's order, R reward models. Results are int16 [n]: the place of a source, NONE where no
source has one.
"""

import numpy as np

NONE = -1


def min_ce(
    ce: np.ndarray, lossy: np.ndarray, *, response_bytes: np.ndarray, response_tokens: np.ndarray, rule: str = "sum"
) -> np.ndarray:
    """The source that understands the ground truth best: the least cross-entropy (arXiv 2408.04998, equations 1 and 2).

    ce float [n, S]: nats over the response's bytes, the stop token left out; NaN where a source has none. lossy bool [n, S]:
    its tokens do not spell the whole response (unknown characters cost it too little), so that it is compared only with
    others of its kind, where no source has read it all. response_bytes [n]; response_tokens [n, S]: its own tokens.
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
    values = np.where(np.isfinite(ce), ce, np.inf) / divisors[rule]
    whole = np.where(lossy, np.inf, values)
    values = np.where(np.isfinite(whole).any(1, keepdims=True), whole, values)
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
