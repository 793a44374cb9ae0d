"""The loss curve shows what metrics.jsonl holds: every step, every phase, every validation value."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.report.loss_curve import MODE_COLOURS, draw_losses, phases_of, running_median
from megatron_fuse.training.metrics import STEP


def test_the_loss_curve_shows_every_step_phase_and_validation_value() -> None:
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = [
        {"kind": "held-out", "iteration": 0, "ce/training": 1.5, "kl/training": 0.5}
    ]
    for step in range(1, 41):
        row = {"kind": STEP, "iteration": step, "phase": "first" if step <= 15 else "second", "loss": 1.0}
        row |= {name: float(rng.uniform(0.5, 1)) for name in ("ce/inference", "kl/inference")}
        if step > 15:
            row |= {name: float(rng.uniform(0.5, 1)) for name in ("ce/training", "kl/training")}
        rows.append({name: None if step == 20 and "/" in name else value for name, value in row.items()})
    rows.append({"kind": "held-out", "iteration": 40, "ce/training": 0.4, "kl/training": 0.1})
    panels = draw_losses(rows).axes
    assert len(panels) == 2
    for loss, axes in zip(("ce", "kl"), panels, strict=True):
        boundary = [line.get_xdata() for line in axes.lines if line.get_linestyle() == "--"]
        assert [list(x) for x in boundary] == [[15, 15]]
        for mode, colour in MODE_COLOURS.items():
            name = f"{loss}/{mode}"
            pale = next(line for line in axes.lines if line.get_color() == colour and line.get_alpha() == 0.3)
            shown = dict(zip(*pale.get_data(), strict=True))
            for row in rows:
                if row["kind"] == STEP and name in row:
                    value = shown[row["iteration"]]
                    assert math.isnan(value) if row[name] is None else value == row[name]
        points = next(line for line in axes.lines if line.get_marker() == "o")
        assert list(points.get_ydata()) == [rows[0][f"{loss}/training"], rows[-1][f"{loss}/training"]]
    assert [text.get_text() for text in panels[0].texts] == ["phase 1: first", "phase 2: second"]


@pytest.mark.parametrize("spike", [1e6, -1e6])
@pytest.mark.parametrize("steps", [80, 400])  # below 80 every step is its own median
def test_neither_a_spike_nor_zero_takes_an_axis(steps: int, spike: float) -> None:
    values = np.random.default_rng(steps).uniform(6, 7, steps)
    values[2] = spike
    rows = [
        {"kind": STEP, "iteration": n + 1, "phase": "one", "loss": v, "ce/training": v}
        for n, v in enumerate(values)
    ]
    rows.append({"kind": "held-out", "iteration": steps, "ce/training": 8.0})
    (axes,) = draw_losses(rows).axes
    low, high = axes.get_ylim()
    assert high - low < 3 and high > 8
    (trend,) = (line for line in axes.lines if line.get_linewidth() == 1.8)
    assert low < min(trend.get_ydata()) and max(trend.get_ydata()) < high


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=20))
def test_phases_are_runs_of_one_name(names: list[str]) -> None:
    steps = [{"phase": name, "iteration": number} for number, name in enumerate(names)]
    phases = phases_of(steps)
    assert [row for phase in phases for row in phase] == steps
    assert all(len({row["phase"] for row in phase}) == 1 for phase in phases)
    assert all(left[-1]["phase"] != right[0]["phase"] for left, right in itertools.pairwise(phases))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(0, 10))
def test_a_running_median_follows_what_does_not_turn_and_ignores_one_outlier(
    values: list[float], reach: int
) -> None:
    rising = np.sort(values)
    inner = slice(reach, max(len(rising) - reach, reach))
    np.testing.assert_array_equal(running_median(rising, reach)[inner], rising[inner])
    flat = np.ones(2 * reach + 3)
    flat[reach] = 1e9
    if reach > 1:  # at the ends a window has reach + 1 values, of which two have no middle one
        np.testing.assert_array_equal(running_median(flat, reach), np.ones(len(flat)))
