"""The chart of an open-ended evaluation: win rates, raw and length-controlled, with 95 % intervals."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from megatron_fuse.evaluation.open_ended.results import Judged
from megatron_fuse.evaluation.open_ended.win_rates import Rate
from megatron_fuse.reporting.colours import BLUE, VERMILION
from megatron_fuse.text_safety import printable


def draw_win_rates(judges: Sequence[Judged]) -> Figure:
    """One panel per judge, one line per pair."""
    lines = max((len(judged.pairs) for judged in judges), default=1)
    size = (5 + 4 * len(judges), 1.6 + 0.45 * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(judges), squeeze=False)[0]
    for axes, judged in zip(panels, judges, strict=True):
        for line, pair in enumerate(judged.pairs):
            _draw(axes, pair.overall.win_rate, line - 0.12, BLUE, "win rate" if line == 0 else "")
            _draw(
                axes,
                pair.overall.controlled,
                line + 0.12,
                VERMILION,
                "length-controlled" if line == 0 else "",
            )
        names = [_plain(f"{pair.model} against {pair.opponent}") for pair in judged.pairs]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_title(_plain(judged.judge))
        axes.set_xlabel("per cent, with 95 % intervals")
        axes.axvline(50, color="#444444", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _plain(text: str) -> str:
    """A text that matplotlib shows as it is: a dollar would begin a formula."""
    return printable(text).replace("$", r"\$")


def _draw(axes, rate: Rate | None, line: float, colour: str, label: str) -> None:
    if rate is None:
        return
    low, high = (rate.value if bound is None else bound for bound in (rate.low, rate.high))
    # The percentiles of the samples may lie on one side of the value.
    sides = [[100 * max(rate.value - low, 0)], [100 * max(high - rate.value, 0)]]
    axes.errorbar(
        100 * rate.value,
        line,
        xerr=sides,
        fmt="o",
        color=colour,
        markersize=5,
        capsize=2,
        label=label or None,
    )
