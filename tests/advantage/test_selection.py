"""Laws of the choice between sources: MinCE and the majority vote, against loops that say the rule word by word."""

import numpy as np
import pytest

from megatron_fuse.advantage.selection import NONE, majority_vote, min_ce

NAN = np.nan
CE = np.array([[3.0, 2.0, 2.0], [NAN, 5.0, 4.0], [NAN, NAN, NAN], [np.inf, 9.0, NAN], [1.0, 1.0, 1.0], [0, NAN, 1]])
BYTES = np.array([4, 1, 9, 2, 3, 0])
WHOLE = np.zeros(CE.shape, bool)
ONES = np.ones(CE.shape, np.int32)


@pytest.mark.parametrize("rule", ["sum", "per_byte", "per_token"])
def test_min_ce_takes_the_least_and_the_first_of_equals(rule: str) -> None:
    chosen = min_ce(CE, WHOLE, response_bytes=BYTES, response_tokens=ONES, rule=rule)
    assert chosen.tolist() == [1, 2, NONE, 1, 0, 0]


def test_only_per_token_depends_on_how_a_source_cuts_the_text() -> None:
    tokens = np.array([[6, 2, 1]] * len(CE), np.int32)
    chosen = {
        rule: min_ce(CE, WHOLE, response_bytes=BYTES, response_tokens=tokens, rule=rule).tolist()
        for rule in ("sum", "per_byte", "per_token")
    }
    assert chosen["sum"] == chosen["per_byte"] == [1, 2, NONE, 1, 0, 0]
    assert chosen["per_token"] == [0, 1, NONE, 1, 0, 0]


def test_a_source_that_did_not_read_all_wins_only_where_none_did() -> None:
    lossy = np.array([[0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0], [1, 1, 1], [1, 0, 1]], bool)
    chosen = min_ce(CE, lossy, response_bytes=BYTES, response_tokens=ONES)
    assert chosen.tolist() == [2, 1, NONE, 1, 0, 0]


def test_min_ce_refuses_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="per_word"):
        min_ce(CE, WHOLE, response_bytes=BYTES, response_tokens=ONES, rule="per_word")


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
