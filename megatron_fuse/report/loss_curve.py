"""The loss curve of a training run: cross-entropy and KL of each mode, drawn from metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_fuse.reporting.colours import BLUE, VERMILION
from megatron_fuse.reporting.layout import save_picture
from megatron_fuse.training.metrics import LOSS_CURVE, METRICS, STEP, VALIDATION, read_metrics

MODE_COLOURS = {"training": BLUE, "inference": VERMILION}
# The latter are drawn over the former, and often coincide.
VALIDATION_SIZES = {"training": 8, "inference": 4.5}
LEARNED_FROM = {"training": "ground truth", "inference": "winning answers"}
LOSSES = {"ce": "cross-entropy (nats per token)", "kl": "KL to the teacher (nats per token)"}
_STYLE: dict[Any, Any] = {  # matplotlib types the keys by one literal of all names
    "text.parse_math": False,  # a phase's name may hold a dollar sign
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}

Rows = Sequence[dict[str, Any]]


def write_loss_curve(directory: Path) -> None:
    """Draws DIRECTORY/loss.png from DIRECTORY/metrics.jsonl. Writes nothing if no step has a finite loss."""
    rows = read_metrics(directory / METRICS)
    if any(row["kind"] == STEP and row["loss"] is not None for row in rows):
        save_picture(draw_losses(rows), directory / LOSS_CURVE)


def draw_losses(rows: Rows) -> Figure:
    """One panel per loss, one colour per mode: steps as a pale line, their running median as a strong line.

    Validation values are points. A dashed line marks the begin of a phase. Values that were not finite leave
    a gap.
    rows: those of metrics.jsonl, with at least one step with a finite loss.
    """
    steps = [row for row in rows if row["kind"] == STEP]
    validation = [row for row in rows if row["kind"] == VALIDATION]
    losses = [
        loss
        for loss in LOSSES
        if any(row.get(f"{loss}/{mode}") is not None for row in steps for mode in MODE_COLOURS)
    ]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 0.9 + 2.9 * len(losses)))
        panels = figure.subplots(len(losses), 1, sharex=True, squeeze=False)[:, 0]
        for axes, loss in zip(panels, losses, strict=True):
            for mode in MODE_COLOURS:
                _draw_trend(axes, phases_of(steps), f"{loss}/{mode}", mode)
                _draw_validation(axes, validation, f"{loss}/{mode}", mode)
            axes.set_ylim(*_bounds(axes, [_series(steps, f"{loss}/{mode}")[1] for mode in MODE_COLOURS]))
            axes.set_xlim(0, max(row["iteration"] for row in rows) * 1.01)
            for mode in MODE_COLOURS:
                axes.plot(
                    *_series(steps, f"{loss}/{mode}"),
                    color=MODE_COLOURS[mode],
                    alpha=0.3,
                    linewidth=0.8,
                    zorder=1,
                )
            axes.set_ylabel(LOSSES[loss])
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
            _draw_phases(axes, phases_of(steps), named=axes is panels[0])
        panels[-1].set_xlabel("iteration")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    return figure


def phases_of(steps: Rows) -> list[Rows]:
    """The steps of each phase, in order."""
    begins = [0, *(n for n in range(1, len(steps)) if steps[n]["phase"] != steps[n - 1]["phase"])]
    return [steps[begin:end] for begin, end in zip(begins, [*begins[1:], len(steps)], strict=True)]


def running_median(values: np.ndarray, reach: int) -> np.ndarray:
    """[n]: for every value the median of it and of up to `reach` values on either side.

    One outlier does not move it.
    """
    return np.array([np.median(values[max(at - reach, 0) : at + reach + 1]) for at in range(len(values))])


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, values), float64, of the rows that have this number.

    A value that was not finite is NaN.
    """
    points = [(row["iteration"], np.nan if row[name] is None else row[name]) for row in rows if name in row]
    iterations, values = np.array(points, np.float64).reshape(-1, 2).T
    return iterations, values


def _draw_trend(axes: Axes, phases: Sequence[Rows], name: str, mode: str) -> None:
    reach = sum(map(len, phases)) // 80
    label: str | None = f"{mode} mode ({LEARNED_FROM[mode]})"
    for steps in phases:  # each phase by itself, because the weights of the losses change between phases
        x, y = _series(steps, name)
        finite = np.isfinite(y)
        if finite.any():
            trend = running_median(y[finite], reach)
            axes.plot(x[finite], trend, color=MODE_COLOURS[mode], linewidth=1.8, label=label)
            label = None  # one entry in the legend


def _draw_validation(axes: Axes, validation: Rows, name: str, mode: str) -> None:
    x, y = _series(validation, name)
    if len(x):
        style: dict[str, Any] = {
            "color": MODE_COLOURS[mode],
            "markeredgecolor": "black",
            "markersize": VALIDATION_SIZES[mode],
        }
        axes.plot(x, y, "o", label=f"{mode} mode, validation", zorder=3, clip_on=False, **style)


def _bounds(axes: Axes, of_steps: Sequence[np.ndarray]) -> tuple[float, float]:
    """(low, high) of the y axis: room for what is drawn already, and for the steps between two percentiles.

    These are the 1st and the 99th, each moved inwards to a step. So a spike does not take the whole axis. The
    axis need not begin at zero, as a loss may stay far above it.
    """
    finite = [values[np.isfinite(values)] for values in of_steps]
    lows = [np.percentile(values, 1, method="higher") for values in finite if len(values)]
    highs = [np.percentile(values, 99, method="lower") for values in finite if len(values)]
    low, high = min(axes.dataLim.ymin, *lows), max(axes.dataLim.ymax, *highs)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _draw_phases(axes: Axes, phases: Sequence[Rows], *, named: bool) -> None:
    for number, steps in enumerate(phases):
        begin = steps[0]["iteration"] - 1  # number of steps before the phase
        if number:
            axes.axvline(begin, color="#444444", linewidth=1, linestyle="--")
        if named:
            axes.annotate(
                f"phase {number + 1}: {steps[0]['phase']}",
                (begin, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5),
                textcoords="offset points",
                color="#444444",
            )
