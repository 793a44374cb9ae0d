"""Means over seeds, their errors and paired differences, against straight computation."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.experiments.statistics import Mean, mean, paired_difference

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@given(VALUES)
def test_mean_and_standard_error(values: list[float]) -> None:
    found = mean(values)
    assert found is not None and found.n == len(values)
    assert math.isclose(found.value, statistics.fmean(values), abs_tol=1e-9)
    assert math.isclose(found.error, statistics.stdev(values) / math.sqrt(len(values)), rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 29, 30])
def test_the_interval_holds_95_percent_of_student_t(degrees: int) -> None:
    half = Mean(0.0, 1.0, degrees + 1).confidence
    # Student's density is proportional to (1 + t^2 / degrees)^-(degrees + 1)/2; substituting t = tan(u) makes the range finite.
    u = np.linspace(0, np.pi / 2, 2_000_001)[:-1]
    density = (1 + np.tan(u) ** 2 / degrees) ** (-(degrees + 1) / 2) / np.cos(u) ** 2
    inside = np.tan(u) <= half
    assert abs(density[inside].sum() / density.sum() - 0.95) < 2e-4


@given(st.dictionaries(st.integers(0, 20), st.floats(-100, 100), min_size=2), st.floats(-10, 10))
def test_what_a_seed_does_to_both_drops_out(baseline: dict[int, float], gain: float) -> None:
    of = {seed: value + gain for seed, value in baseline.items()} | {99: 1e6}  # a seed that the baseline has not
    found = paired_difference(of, baseline)
    assert found is not None and found.n == len(baseline)
    assert math.isclose(found.value, gain, abs_tol=1e-9) and found.error < 1e-9


def test_a_single_seed_has_no_error_and_is_never_clear() -> None:
    found = paired_difference({1: 5.0}, {1: 1.0})
    assert found == Mean(4.0, None, 1) and not found.is_clear and found.confidence is None
    assert paired_difference({1: 5.0}, {2: 1.0}) is None


@pytest.mark.parametrize(("error", "clear"), [(0.49, True), (0.51, False)])
def test_clear_is_more_than_two_standard_errors(error: float, clear: bool) -> None:
    assert Mean(1.0, error, 5).is_clear is clear and Mean(-1.0, error, 5).is_clear is clear
