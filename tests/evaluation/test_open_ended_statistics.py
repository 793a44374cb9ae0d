"""Win rates, their errors, and the length-controlled win rate, against formulas written another way."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_fuse.evaluation.open_ended.answers import Answer
from megatron_fuse.evaluation.open_ended.judgements import (
    Judgement,
    PairwiseComparison,
    comparisons_of,
    pairs_of,
)
from megatron_fuse.evaluation.open_ended.length_control import (
    RIDGE,
    controlled_win_rate,
    fit,
    instruction_difficulty,
)
from megatron_fuse.evaluation.open_ended.preferences import Preferences
from megatron_fuse.evaluation.open_ended.prompts import Prompt
from megatron_fuse.evaluation.open_ended.reward_judge import vote
from megatron_fuse.evaluation.open_ended.win_rates import pair_results

CATEGORIES = ("math", "writing", None)


def prompts_of(count: int, turns: int = 1) -> list[Prompt]:
    return [Prompt(str(n), CATEGORIES[n % 3], [f"Q{n}"] * turns, [None] * turns, {}) for n in range(count)]


def results(prompts: list[Prompt], preferences: dict[str, np.ndarray], lengths: dict[str, np.ndarray]):
    """The results against `base`. preferences, lengths: by model [prompts, turns]; base has lengths too."""
    turns = len(prompts[0].turns)
    places = [(n, turn) for n in range(len(prompts)) for turn in range(turns)]
    answers = {
        model: {
            (str(n), turn + 1): Answer(str(n), turn + 1, "x" * int(of_model[n, turn])) for n, turn in places
        }
        for model, of_model in lengths.items()
    }
    pairs = pairs_of(list(lengths), "base", "baseline")
    judgements = []
    for comparison in comparisons_of(prompts, answers, pairs):
        value = preferences[comparison.model][int(comparison.prompt.id), comparison.turn - 1]
        judgements.append(Judgement(comparison, None if np.isnan(value) else float(value)))
    return pair_results(judgements, answers, pairs)


def test_pairs_are_every_model_against_the_baseline_or_all() -> None:
    names = ["a", "b", "c", "d"]
    assert pairs_of(names, "b", "baseline") == [("a", "b"), ("c", "b"), ("d", "b")]
    found = pairs_of(names, "b", "all")
    assert found[:3] == pairs_of(names, "b", "baseline")
    assert sorted(map(sorted, found)) == sorted(
        [first, second] for at, first in enumerate(names) for second in names[at + 1 :]
    )


def test_a_win_rate_counts_half_of_the_ties_and_leaves_out_what_has_no_verdict() -> None:
    rng = np.random.default_rng(0)
    prompts = prompts_of(31, turns=2)
    given = rng.choice([1, 0.5, 0, np.nan], (31, 2))
    lengths = {name: rng.integers(1, 90, (31, 2)) for name in ("base", "m")}
    (pair,) = results(prompts, {"m": given}, lengths)
    tally = pair.overall
    assert (tally.wins, tally.ties, tally.losses) == tuple(int((given == x).sum()) for x in (1, 0.5, 0))
    assert tally.no_verdict == np.isnan(given).sum() and tally.judged + tally.no_verdict == 62
    assert tally.win_rate.value == pytest.approx(np.nanmean(given), rel=1e-12)
    for turn in (1, 2):
        assert pair.turns[turn].win_rate.value == pytest.approx(np.nanmean(given[:, turn - 1]), rel=1e-12)
    for number, category in enumerate(CATEGORIES[:2]):
        assert pair.categories[category].win_rate.value == pytest.approx(np.nanmean(given[number::3]))
        assert pair.categories[category].controlled is None
    assert pair.categories.keys() == {"math", "writing"}


def test_without_a_verdict_there_is_no_win_rate() -> None:
    (pair,) = results(
        prompts_of(4), {"m": np.full((4, 1), np.nan)}, {name: np.ones((4, 1)) for name in ("base", "m")}
    )
    assert pair.overall.win_rate is None and pair.overall.controlled is None
    assert pair.overall.no_verdict == 4


@pytest.mark.parametrize("same", [False, True])
def test_errors_are_those_of_drawing_other_prompts(same: bool) -> None:
    """If both turns of a prompt have the same outcome, the second adds nothing: prompts count, not turns."""
    rng = np.random.default_rng(1)
    count = 400
    given = rng.choice([1.0, 0.5, 0.0], (count, 2), p=[0.5, 0.2, 0.3])
    if same:
        given[:, 1] = given[:, 0]
    lengths = {name: rng.integers(1, 90, (count, 2)) for name in ("base", "m")}
    (pair,) = results(prompts_of(count, turns=2), {"m": given}, lengths)
    rate = pair.overall.win_rate
    expected = given.mean(1).std(ddof=1) / np.sqrt(count)
    # 1000 samples know a standard deviation to 2 to 3 %; a normal interval is a good one for 400 prompts.
    assert rate.standard_error == pytest.approx(expected, rel=0.1)
    assert rate.low == pytest.approx(rate.value - 1.96 * expected, abs=0.3 * expected)
    assert rate.high == pytest.approx(rate.value + 1.96 * expected, abs=0.3 * expected)
    alone = results(prompts_of(1), {"m": np.ones((1, 1))}, {name: np.ones((1, 1)) for name in ("base", "m")})
    assert alone[0].overall.win_rate.standard_error is None


# k: columns; n: comparisons; the last is separable, where Newton alone would run away without the ridge
@pytest.mark.parametrize(("n", "k", "separable"), [(40, 1, False), (300, 3, False), (60, 2, True)])
def test_a_fit_is_where_the_gradient_of_the_penalised_likelihood_is_zero(
    n: int, k: int, separable: bool
) -> None:
    rng = np.random.default_rng(n)
    features = rng.normal(size=(n, k))
    preference = (features[:, 0] > 0) * 1.0 if separable else rng.choice([0, 0.5, 1], n)
    weights = rng.integers(0, 4, (5, n)).astype(float)
    found = torch.tensor(fit(features, preference, weights), requires_grad=True)
    exponent = found @ torch.tensor(features).T
    target = torch.tensor(preference).expand_as(exponent)
    loss = binary_cross_entropy_with_logits(exponent, target, weight=torch.tensor(weights), reduction="sum")
    (loss + RIDGE / 2 * found.square().sum()).backward()
    assert torch.isfinite(found).all()
    assert found.grad.abs().max() < 1e-5 * n


def controlled(preference: np.ndarray, difference: np.ndarray) -> float:
    return float(controlled_win_rate(preference, difference, None, np.ones((1, len(preference))))[0])


@pytest.mark.parametrize("seed", range(5))
def test_a_judge_that_goes_by_length_alone_leaves_half(seed: int) -> None:
    rng = np.random.default_rng(seed)
    difference = rng.normal(300, 300, 600)  # the model's answers are mostly longer
    preference = (rng.random(600) < 1 / (1 + np.exp(-4 * np.tanh(difference / 300)))).astype(float)
    assert preference.mean() > 0.75
    # The error of the constant in such a regression of 600 comparisons is about 0.04 in probability.
    assert controlled(preference, difference) == pytest.approx(0.5, abs=0.12)
    # If length decides without chance, the slope is as steep as the ridge allows. Then it counts more where
    # exactly, between the two shortest differences, the curve passes 0.5.
    assert controlled((difference > 0) * 1.0, difference) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_where_length_plays_no_role_both_rates_are_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    difference = rng.normal(0, 300, 800)
    preference = rng.choice([1.0, 0.5, 0.0], 800, p=[0.6, 0.2, 0.2])
    assert controlled(preference, difference) == pytest.approx(preference.mean(), abs=0.01)
    same = np.full(800, 120.0)  # no spread: no length term
    assert controlled(preference, same) == pytest.approx(preference.mean(), abs=1e-4)


def test_a_model_that_always_wins_has_finite_numbers() -> None:
    prompts = prompts_of(50)
    rng = np.random.default_rng(0)
    lengths = {name: rng.integers(1, 90, (50, 1)) for name in ("base", "m", "n")}
    always = {"m": np.ones((50, 1)), "n": np.zeros((50, 1))}
    won, lost = results(prompts, always, lengths)
    assert won.overall.win_rate.value == 1 and lost.overall.win_rate.value == 0
    for pair in (won, lost):
        numbers = [*vars(pair.overall.controlled).values(), *vars(pair.overall.win_rate).values()]
        assert np.isfinite(numbers).all()
    assert won.overall.controlled.value > 0.98 and lost.overall.controlled.value < 0.02


def test_exchanging_the_models_exchanges_the_rates() -> None:
    rng = np.random.default_rng(3)
    difference = rng.normal(100, 200, 200)
    preference = rng.choice([1.0, 0.5, 0.0], 200, p=[0.5, 0.2, 0.3])
    here, there = controlled(preference, difference), controlled(1 - preference, -difference)
    assert here + there == pytest.approx(1, abs=1e-9)


def test_difficulty_is_found_in_the_other_models_matches() -> None:
    rng = np.random.default_rng(4)
    count, models = 300, 6
    truth = rng.normal(0, 1.5, count)
    places = [(str(n), 1) for n in range(count)]
    others = []
    for quality in rng.normal(0, 0.5, models):
        difference = rng.normal(0, 100, count)
        exponent = quality + np.tanh(difference / 100) + truth
        preference = (rng.random(count) < 1 / (1 + np.exp(-exponent))).astype(float)
        others.append(Preferences(places, preference, difference))
    found = instruction_difficulty(others)
    assert list(found) == places
    assert np.corrcoef(list(found.values()), truth)[0, 1] > 0.75
    turned = instruction_difficulty([other.reversed() for other in others])
    assert list(turned.values()) == pytest.approx([-value for value in found.values()], abs=0.01)


def test_difficulty_uses_the_other_models_and_not_the_model_itself() -> None:
    """If the prompts alone decide, the rate is the share of the easy ones, with the term and without."""
    rng = np.random.default_rng(5)
    prompts = prompts_of(200)
    hard = rng.random((200, 1)) < 0.5
    lengths = {name: rng.integers(50, 90, (200, 1)) for name in ("base", "m", "n")}
    preferences = {"m": 1.0 - hard, "n": 1.0 - hard}
    both = results(prompts, preferences, lengths)
    assert both[0].overall.controlled.value == pytest.approx(1 - hard.mean(), abs=0.02)
    one = results(prompts, {"m": preferences["m"]}, {name: lengths[name] for name in ("base", "m")})
    assert one[0].overall.controlled.value == pytest.approx(1 - hard.mean(), abs=0.02)


def test_reward_models_vote_and_the_strongest_decides() -> None:
    first, second, tied = [2.0, 1.0], [1.0, 2.0], [3.0, 3.0]
    for scores, strongest, wanted in [
        ([first], 0, 1),
        ([second], 0, 0),
        ([tied], 0, 0.5),
        ([first, first, second], 2, 1),
        ([first, second], 0, 1),
        ([first, second], 1, 0),
        ([first, tied], 1, 1),  # one votes, the strongest abstains
        ([first, second, tied], 2, 0.5),
    ]:
        assert vote(np.array(scores), strongest) == wanted
        assert vote(np.array(scores)[:, ::-1], strongest) == 1 - wanted


def test_only_answered_turns_are_matched() -> None:
    prompts = prompts_of(3, turns=2)
    answers = {
        "base": {(str(n), turn): Answer(str(n), turn, "x") for n in range(3) for turn in (1, 2)},
        "m": {("0", 1): Answer("0", 1, "y"), ("0", 2): Answer("0", 2, "y"), ("2", 1): Answer("2", 1, "y")},
    }
    found = comparisons_of(prompts, answers, [("m", "base")])
    assert [comparison.place for comparison in found] == [("0", 1), ("2", 1), ("0", 2)]
    assert all(isinstance(comparison, PairwiseComparison) and comparison.model == "m" for comparison in found)
