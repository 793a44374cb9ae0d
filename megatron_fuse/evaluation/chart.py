"""The chart of a comparison: values and differences to the baseline, ± two standard errors."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_fuse.evaluation.comparison import TIE, Comparison
from megatron_fuse.reporting.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_SPREAD = 0.7  # share of a benchmark's line that all models take together


def draw_comparison(comparison: Comparison) -> Figure:
    """Values on the left, differences on the right, one line per benchmark.

    A hollow marker of a difference is a tie.
    """
    models, rows = comparison.models, comparison.rows
    height = 1.4 + len(rows) * max(0.45, 0.18 * len(models))
    figure = Figure(figsize=(11, height), layout="constrained")
    values, differences = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for number, model in enumerate(models):
        style = {"color": _COLOURS[number % len(_COLOURS)], "markersize": 5, "capsize": 2, "linewidth": 1.2}
        offset = _SPREAD * ((number + 0.5) / len(models) - 0.5)
        values.errorbar([], [], xerr=[], fmt="o", label=model, **style)
        for line, row in enumerate(rows):
            value = row.values[model]
            if value.value is not None:
                error = 200 * (value.standard_error or 0)
                values.errorbar(100 * value.value, line + offset, xerr=error, fmt="o", **style)
            difference = row.differences.get(model)
            if difference is not None:
                filled = {"markerfacecolor": "white"} if difference.verdict == TIE else {}
                error = 200 * difference.standard_error
                differences.errorbar(
                    100 * difference.value, line + offset, xerr=error, fmt="o", **style, **filled
                )
    values.set_yticks(range(len(rows)), [row.benchmark.heading for row in rows])
    values.set_ylim(len(rows) - 0.5, -0.5)
    values.set_xlabel("per cent, ± 2 standard errors")
    differences.set_xlabel(f"difference to {comparison.baseline},\n± 2 standard errors (hollow: a tie)")
    differences.axvline(0, color="#444444", linewidth=1)
    for axes in (values, differences):
        _tidy(axes)
    figure.legend(loc="outside upper center", ncols=min(len(models), 6), frameon=False)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
