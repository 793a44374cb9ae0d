"""Means over seeds, their errors and paired differences, against straight computation."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.experiments.comparison import compare
from megatron_fuse.reporting.statistics import (
    Mean,
    chi_square_quantile,
    clear,
    digamma,
    mean,
    moderated,
    paired_difference,
    smallest_seen,
    t_quantile,
    t_tail,
    trigamma,
    trigamma_inverse,
)

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@given(VALUES)
def test_mean_and_standard_error(values: list[float]) -> None:
    found = mean(values)
    assert found is not None and found.n == len(values)
    assert math.isclose(found.value, statistics.fmean(values), abs_tol=1e-9)
    assert math.isclose(
        found.error, statistics.stdev(values) / math.sqrt(len(values)), rel_tol=1e-6, abs_tol=1e-9
    )


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 29, 30])
def test_the_interval_holds_95_percent_of_student_t(degrees: int) -> None:
    half = Mean(0.0, 1.0, degrees + 1, degrees).confidence
    # Student's density is proportional to (1 + t^2 / degrees)^-(degrees + 1)/2; substituting t = tan(u) makes
    # the range finite.
    u = np.linspace(0, np.pi / 2, 2_000_001)[:-1]
    density = (1 + np.tan(u) ** 2 / degrees) ** (-(degrees + 1) / 2) / np.cos(u) ** 2
    inside = np.tan(u) <= half
    assert abs(density[inside].sum() / density.sum() - 0.95) < 2e-4


@given(st.dictionaries(st.integers(0, 20), st.floats(-100, 100), min_size=2), st.floats(-10, 10))
def test_what_a_seed_does_to_both_drops_out(baseline: dict[int, float], gain: float) -> None:
    # A seed that the baseline has not.
    of = {seed: value + gain for seed, value in baseline.items()} | {99: 1e6}
    found = paired_difference(of, baseline)
    assert found is not None and found.n == len(baseline)
    assert math.isclose(found.value, gain, abs_tol=1e-9) and found.error < 1e-9


def test_a_single_seed_has_no_error_and_is_never_clear() -> None:
    found = paired_difference({1: 5.0}, {1: 1.0})
    assert found == Mean(4.0, None, 1, 0) and found.p_value == 1 and found.confidence is None
    assert paired_difference({1: 5.0}, {2: 1.0}) is None


@given(st.floats(0, 60), st.integers(1, 40))
def test_the_tail_of_student_t_is_that_of_its_density(t: float, degrees: int) -> None:
    u = np.linspace(0, np.pi / 2, 200_001)[:-1]
    density = (1 + np.tan(u) ** 2 / degrees) ** (-(degrees + 1) / 2) / np.cos(u) ** 2
    assert abs(density[np.tan(u) > t].sum() / density.sum() / 2 - t_tail(t, degrees)) < 1e-4


@pytest.mark.parametrize("degrees", [1, 4, 30])
@pytest.mark.parametrize("share", [0.8, 0.975, 0.9995])
def test_the_quantile_inverts_the_tail(degrees: int, share: float) -> None:
    assert math.isclose(t_tail(t_quantile(share, degrees), degrees), 1 - share, rel_tol=1e-6)


@given(st.floats(0.05, 500))
def test_gamma_functions_are_those_of_torch(x: float) -> None:
    at = torch.tensor(x, dtype=torch.float64)
    assert math.isclose(digamma(x), torch.special.digamma(at).item(), rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(trigamma(x), torch.special.polygamma(1, at).item(), rel_tol=1e-6)
    assert math.isclose(trigamma_inverse(trigamma(x)), x, rel_tol=1e-6)


def slow_holm(p_values: dict[str, float]) -> set[str]:
    """A hypothesis is rejected if its adjusted value, the running maximum of rank-wise products, is at
    most 5 %.
    """
    order, highest, found = sorted(p_values, key=lambda name: p_values[name]), 0.0, set()
    for rank, name in enumerate(order):
        highest = max(highest, (len(order) - rank) * p_values[name])
        found |= {name} if highest <= 0.05 else set()
    return found


@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(1e-4, 0.2), max_size=8))
def test_holm_rejects_what_its_adjusted_values_say(p_values: dict[str, float]) -> None:
    assert clear(p_values) == slow_holm(p_values)


def tables(
    rows: int, seeds: int, effect: float, rng: np.random.Generator
) -> dict[str, dict[str, dict[int, float]]]:
    """A table of noise, whose first row has an effect."""
    noise = rng.normal(size=(rows + 1, seeds)) * 2
    noise[1] += effect
    return {f"r{n}": {"m": dict(enumerate(line.tolist()))} for n, line in enumerate(noise)}


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_table_without_effects_rarely_calls_one_clear(seeds: int) -> None:
    rng, false = np.random.default_rng(5), 0
    for _ in range(600):
        values = tables(8, seeds, 0, rng)
        false += bool(compare(values, "m", dict.fromkeys(values, "r0")).clear)
    assert false / 600 < 0.09, "the level is 5 %, and the standard error of this share is 0.9 %"


def test_an_effect_of_the_size_that_is_promised_is_found_in_four_tables_of_five() -> None:
    rng = np.random.default_rng(6)
    promised = [
        compare(values, "m", dict.fromkeys(values, "r0")).smallest_seen
        for values in (tables(8, 5, 0, rng) for _ in range(60))
    ]
    size = float(np.median([each for each in promised if each is not None]))
    hits = 0
    for _ in range(300):
        values = tables(8, 5, size, rng)
        hits += "r1" in compare(values, "m", dict.fromkeys(values, "r0")).clear
    assert 0.68 < hits / 300 < 0.92


def test_equal_variances_are_pooled_and_unequal_ones_are_not() -> None:
    rng = np.random.default_rng(7)
    equal = {f"r{n}": mean(rng.normal(size=5).tolist()) for n in range(40)}
    found = moderated(equal)
    errors = [each.error for each in found.values()]
    assert (
        max(errors) / min(errors)
        < 1.6
        < max(e.error for e in equal.values()) / min(e.error for e in equal.values())
    )
    assert {each.degrees for each in found.values()} != {4}
    unequal = {f"r{n}": mean((rng.normal(size=5) * 10.0 ** (n % 5)).tolist()) for n in range(40)}
    shrunk = moderated(unequal)
    ratios = [each.error / unequal[name].error for name, each in shrunk.items()]
    assert 0.9 < np.median(ratios) < 1.1 and {each.degrees for each in shrunk.values()} == {4}
    assert all(each.value == unequal[name].value for name, each in shrunk.items())


def test_expected_rows_are_a_family_of_their_own() -> None:
    rng = np.random.default_rng(8)
    values = tables(30, 5, 0, rng)
    values["r1"] = {"m": {seed: value + 3.6 for seed, value in values["r0"]["m"].items()}}
    values["r1"]["m"][0] += 2.5
    baselines = dict.fromkeys(values, "r0")
    alone = compare(values, "m", baselines, ["r1"])
    among = compare(values, "m", baselines)
    assert alone.differences == among.differences
    p = alone.differences["r1"].p_value
    assert ("r1" in alone.clear) == (p <= 0.05 / 2) and ("r1" in among.clear) == (p <= 0.05 / 30)


def test_equal_differences_do_not_show_that_there_is_no_error() -> None:
    found = paired_difference({1: 71.0, 2: 72.0}, {1: 70.0, 2: 71.0})
    assert found == Mean(1.0, 0.0, 2, 1) and found.p_value == 1


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30])
def test_the_quantile_of_chi_square(degrees: int) -> None:
    drawn = (np.random.default_rng(9).normal(size=(200_000, degrees)) ** 2).sum(1)
    assert abs((drawn < chi_square_quantile(0.95, degrees)).mean() - 0.95) < 0.004


def test_a_noisy_row_beside_quiet_ones_keeps_its_own_error() -> None:
    rng, false = np.random.default_rng(10), 0
    for _ in range(600):
        values = tables(9, 5, 0, rng)
        values["r1"] = {"m": {seed: values["r0"]["m"][seed] + 6 * rng.normal() for seed in values["r0"]["m"]}}
        false += bool(compare(values, "m", dict.fromkeys(values, "r0")).clear)
    assert false / 600 < 0.09, "without care for such rows it is 10 to 15 %"


def test_two_groups_of_rows_share_the_level_of_their_table() -> None:
    rng = np.random.default_rng(11)
    values = tables(3, 5, 0, rng)
    shift = {seed: value + 4.0 + 0.1 * seed for seed, value in values["r0"]["m"].items()}
    values["r1"] = {"m": shift}
    baselines = dict.fromkeys(values, "r0")
    only = compare({name: values[name] for name in ("r0", "r1")}, "m", {"r0": "r0", "r1": "r0"}, ["r1"])
    both = compare(values, "m", baselines, ["r1"])
    assert "r1" in only.clear and "r1" in both.clear
    assert both.smallest_seen is not None


def test_without_errors_there_is_no_promise() -> None:
    assert smallest_seen([]) is None and smallest_seen([Mean(1.0, None, 1, 0)]) is None
