"""Laws of the choice between sources: MinCE and the majority vote, against loops that say the rule word by word."""

import numpy as np
import pytest

from megatron_fuse.advantage.selection import NONE, majority_vote, min_ce


@pytest.mark.parametrize("rule", ["sum", "per_byte"])
def test_min_ce_takes_the_least_and_the_first_of_equals(rule: str) -> None:
    nan = np.nan
    ce = np.array([[3.0, 2.0, 2.0], [nan, 5.0, 4.0], [nan, nan, nan], [np.inf, 9.0, nan], [1.0, 1.0, 1.0], [0, nan, 1]])
    assert min_ce(ce, np.array([4, 1, 9, 2, 3, 0]), rule).tolist() == [1, 2, NONE, 1, 0, 0]


def test_min_ce_refuses_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="per_token"):
        min_ce(np.zeros((1, 1)), np.ones(1), "per_token")


def slow_vote(scores: np.ndarray, answers: np.ndarray, strongest: int) -> tuple[int, list[int]]:
    """One example, in words."""
    sources, models = scores.shape
    able = [s for s in range(sources) if answers[s] != 0 and not np.isnan(scores[s]).any()]
    if not able:
        return NONE, [0] * sources
    distinct = list(dict.fromkeys(answers[s] for s in able))

    def best(answer: int, model: int) -> float:
        return max(scores[s, model] for s in able if answers[s] == answer)

    votes = dict.fromkeys(distinct, 0)
    for model in range(models):
        votes[max(distinct, key=lambda answer: best(answer, model))] += 1  # max takes the first of equals
    most = [answer for answer in distinct if votes[answer] == max(votes.values())]
    winner = max(most, key=lambda answer: best(answer, strongest)) if models else most[0]
    return (
        next(s for s in able if answers[s] == winner),
        [votes[answers[s]] if s in able else 0 for s in range(sources)],
    )


# No model and one source: nobody votes. Three models and two sources: no tie. Even numbers: ties are common.
@pytest.mark.parametrize(("sources", "models"), [(1, 0), (1, 2), (2, 3), (3, 2), (4, 4), (5, 1)])
def test_vote_equals_the_rule_in_words(sources: int, models: int) -> None:
    seed = 100 * sources + models
    random = np.random.default_rng(seed)
    examples = 400
    # Few different scores and answers, so that ties, identical texts, missing and unjudged answers all occur.
    scores = random.integers(0, 4, (examples, sources, models)).astype(np.float32)
    scores[random.random(scores.shape) < 0.05] = np.nan
    answers = random.integers(0, sources + 2, (examples, sources)) * 7
    for strongest in range(max(models, 1)):
        winner, votes = majority_vote(scores, answers, strongest)
        for n in range(examples):
            expected = slow_vote(scores[n], answers[n], strongest)
            assert (winner[n], votes[n].tolist()) == expected, f"seed {seed}, example {n}, strongest {strongest}"


def test_identical_answers_do_not_share_out_their_votes() -> None:
    # Sources 0 and 1 say the same; two of three judges like it best, each at another copy.
    scores = np.array([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [5.0, 5.0, 5.0]]])
    winner, votes = majority_vote(scores, np.array([[3, 3, 8]]))
    assert winner.tolist() == [0]
    assert votes.tolist() == [[2, 2, 1]]
