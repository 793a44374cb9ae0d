"""Laws of the margins, against loops that say each in words, and of the weights that they lead to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_selection import scored_examples

from megatron_fuse.recipe import Margin
from megatron_fuse.selection.margins import example_weights, score_margin, training_margin, vote_margin
from megatron_fuse.selection.rules import NONE, majority_vote, min_ce

NAN = np.nan


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["sum", "per_byte", "per_token"]))
def test_training_margin_is_nats_per_byte_to_the_best_of_the_others(data: st.DataObject, rule: str) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 8)))
    ce = data.draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 3.0, 5.5, 6.0, np.inf, NAN])))
    lossy = data.draw(arrays(bool, shape))
    tokens = data.draw(arrays(np.int32, shape, elements=st.integers(0, 3)))
    size = data.draw(arrays(np.int64, shape[:1], elements=st.integers(0, 9)))
    source = min_ce(ce, lossy, response_bytes=size, response_tokens=tokens, rule=rule)
    margin = training_margin(ce, lossy, size, source)
    for n in range(shape[0]):
        if source[n] == NONE:
            assert np.isnan(margin[n])
            continue
        # Who reads all competes with those who do, else with everyone.
        others = [
            s
            for s in range(shape[1])
            if s != source[n] and np.isfinite(ce[n, s]) and lossy[n, s] == lossy[n, source[n]]
        ]
        gap = min((ce[n, s] for s in others), default=np.inf) - ce[n, source[n]]
        assert margin[n] == np.float32(gap / max(size[n], 1))
        assert margin[n] >= 0 or rule == "per_token"


@settings(max_examples=300, deadline=None)
@given(scored_examples())
def test_inference_margin_is_to_the_next_different_answer(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, answers = case
    winner, votes = majority_vote(scores, answers)
    margin = vote_margin(scores, votes, answers, winner)
    for n, won in enumerate(winner):
        if won == NONE:
            assert np.isnan(margin[n])
            continue
        # Of every text that could win: its votes, or its best score by the only reward model.
        value: dict[int, float] = {}
        for s, text in enumerate(answers[n].tolist()):
            if text != 0 and not np.isnan(scores[n, s]).any():
                own = scores[n, s, 0] if scores.shape[2] == 1 else votes[n, s]
                value[text] = max(value.get(text, -np.inf), own)
        others = [value[text] for text in value if text != answers[n, won]]
        assert margin[n] == value[int(answers[n, won])] - max(others, default=-np.inf)
        assert margin[n] >= 0


def test_a_margin_of_scores_is_not_rounded_before_it_is_taken() -> None:
    scores = np.array([[3e7, 3e7 - 2]], np.float32)
    assert score_margin(scores, np.array([[4, 5]]), np.array([0], np.int16)).tolist() == [2]


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_only_what_is_below_the_margin_counts_less(weight: float) -> None:
    margin = np.array([-0.1, 0, 0.49, 0.5, 2, np.inf, NAN], np.float32)
    options = Margin(at_least=0.5, weight=weight)
    assert example_weights(margin, options).tolist() == [weight, weight, weight, 1, 1, 1, 1]
    assert example_weights(margin, None).tolist() == [1] * 7
