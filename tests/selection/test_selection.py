"""Laws of the choice between sources: MinCE and the majority vote, against loops that say the rule word by
word.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_fuse.selection.rules import NONE, best_score, majority_vote, min_ce

NAN = np.nan
CE = np.array(
    [[3.0, 2.0, 2.0], [NAN, 5.0, 4.0], [NAN, NAN, NAN], [np.inf, 9.0, NAN], [1.0, 1.0, 1.0], [0, NAN, 1]]
)
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


@st.composite
def scored_examples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """scores [n, S, R] and answers [n, S]; few different values, so that ties, identical, empty and
    unscored answers all occur.
    """
    examples, sources, models = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(0, 4))
    score = st.sampled_from([0.0, 1.0, 2.0, NAN])
    scores = draw(arrays(np.float32, (examples, sources, models), elements=score))
    texts = st.integers(0, max(sources // 2, 2)).map(lambda number: number * -7)  # hashes may be negative
    return scores, draw(arrays(np.int64, (examples, sources), elements=texts))


@settings(max_examples=400, deadline=None)
@given(scored_examples())
@example((np.zeros((1, 8, 3), np.float32), np.arange(1, 9)[None]))  # everything is a tie
@example((np.full((1, 1, 2), NAN, np.float32), np.ones((1, 1), int)))
@example((np.zeros((1, 3, 0), np.float32), np.array([[0, 5, 9]])))  # nobody votes
def test_vote_equals_the_rule_in_words(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, answers = case
    for strongest in range(max(scores.shape[2], 1)):
        winner, votes = majority_vote(scores, answers, strongest)
        for n in range(len(scores)):
            assert (winner[n], votes[n].tolist()) == slow_vote(scores[n], answers[n], strongest), (
                n,
                strongest,
            )


@settings(max_examples=200, deadline=None)
@given(scored_examples())
def test_the_best_score_wins_alone(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, answers = case
    for model in range(scores.shape[2]):
        for n, winner in enumerate(best_score(scores[..., model], answers)):
            best: dict[int, float] = {}  # of every text, under the first source that gave it
            able = [s for s, text in enumerate(answers[n]) if text != 0 and not np.isnan(scores[n, s, model])]
            for s in able:
                first = next(other for other in able if answers[n, other] == answers[n, s])
                best[first] = max(best.get(first, -np.inf), scores[n, s, model])
            assert winner == max(best, key=lambda s: best[s], default=NONE)  # max takes the first of equals


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(["sum", "per_byte", "per_token"]))
def test_min_ce_equals_the_rule_in_words(data: st.DataObject, rule: str) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 8)))
    ce = data.draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 3.0, 5.0, 6.0, np.inf, NAN])))
    lossy = data.draw(arrays(bool, shape))
    tokens = data.draw(arrays(np.int32, shape, elements=st.integers(0, 3)))
    size = data.draw(arrays(np.int64, shape[:1], elements=st.integers(0, 9)))
    chosen = min_ce(ce, lossy, response_bytes=size, response_tokens=tokens, rule=rule)
    for n in range(shape[0]):
        readers = [s for s in range(shape[1]) if np.isfinite(ce[n, s])]
        readers = [s for s in readers if not lossy[n, s]] or readers
        # Bytes are the same for all.
        per = {s: max(tokens[n, s], 1) if rule == "per_token" else 1 for s in readers}
        assert chosen[n] == min(readers, key=lambda s: ce[n, s] / per[s], default=NONE)


def test_identical_answers_do_not_share_out_their_votes() -> None:
    # Sources 0 and 1 say the same; two of three reward models like it best, each at another copy.
    scores = np.array([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [5.0, 5.0, 5.0]]])
    winner, votes = majority_vote(scores, np.array([[3, 3, 8]]))
    assert winner.tolist() == [0]
    assert votes.tolist() == [[2, 2, 1]]
