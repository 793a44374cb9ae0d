"""The tables of an experiment as Markdown with pictures, made from its CSV file alone.

Every number is a mean over seeds ± its standard error. Beside it stands the difference to the table's
baseline, paired by seed, with its 95 % confidence interval. ▲ and ▼ mark differences of more than two
standard errors; the others are called ties.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from megatron_fuse.experiments.experiment import Experiment, Table
from megatron_fuse.experiments.results import Result
from megatron_fuse.experiments.statistics import Mean, mean, paired_difference
from megatron_fuse.reporting.layout import Table as Cells
from megatron_fuse.reporting.layout import markdown_table, save_picture, save_text

LEGEND = (
    "Means over seeds ± standard error. In brackets the difference to the baseline, paired by seed, ± half of its 95 % confidence "
    "interval (Student's t). ▲ and ▼: more than two standard errors above or below the baseline; all others are ties. Of differences that "
    "are none, chance marks about 12 % at five seeds and 18 % at three."
)
Values = dict[str, dict[str, dict[int, float]]]  # variant -> metric -> seed -> value


@dataclass(frozen=True)
class Reported:
    """An experiment with its results, and the command that makes them."""

    experiment: Experiment
    results: Sequence[Result]
    command: str


def write_report(reported: Sequence[Reported], path: Path) -> None:
    """Writes one Markdown file with a section for every table whose rows all have a result.

    It names the other tables. Pictures are written beside the CSV file of each experiment.
    """
    parts = []
    for each in reported:
        values: Values = {}
        for result in each.results:
            values.setdefault(result.variant, {}).setdefault(result.metric, {})[result.seed] = result.value
        parts += [each.experiment.preface.strip()] * bool(each.experiment.preface)
        parts += [LEGEND] * (each is reported[0])
        unfinished = []
        for name, table in each.experiment.tables.items():
            lacking = [row for row in dict.fromkeys([*table.rows, table.baseline]) if row not in values]
            if lacking:
                unfinished.append(f"- {table.title} (`--only {name}`): {', '.join(lacking)}")
            else:
                parts.append(_section(each, name, table, values, path))
        if unfinished:
            parts.append("\n".join(["Not in this report, as some of their rows have no result:", "", *unfinished]))
    save_text(path, "\n\n".join(parts) + "\n")


def _section(reported: Reported, name: str, table: Table, values: Values, path: Path) -> str:
    experiment = reported.experiment
    of_table = [result for result in reported.results if result.variant in table.rows]
    picture = experiment.results.with_name(f"{experiment.results.stem}-{name}.png")
    save_picture(draw_table(experiment.metrics, table, values), picture)
    missing = [row for row in table.rows if set(experiment.metrics) - values[row].keys()]
    paragraphs = [
        f"## {table.title}",
        "\n".join(markdown_table(_rows(experiment.metrics, table, values, of_table))),
        *([f"–: not measured ({', '.join(missing)})."] if missing else []),
        *findings(experiment.metrics, table, values),
        *([table.note.strip()] if table.note else []),
        f"![{table.title}]({os.path.relpath(picture, path.parent)})",
        _origin(name, reported.command, of_table),
    ]
    return "\n\n".join(paragraphs)


def _origin(name: str, command: str, results: Sequence[Result]) -> str:
    """The origin of the numbers of a table: command, seeds, split, commit, machine and date."""

    def distinct(field: str) -> str:
        return ", ".join(map(str, sorted({getattr(result, field) for result in results})))

    return (
        f"`{command} --only {name}`; seeds {distinct('seed')}; split {distinct('split')}; commit {distinct('commit')}; "
        f"{distinct('machine')}; {distinct('date')}."
    )


def _rows(metrics: dict[str, str], table: Table, values: Values, results: Sequence[Result]) -> Cells:
    """One row per variant. The last columns hold the cost of its training."""
    rows = []
    for row in table.rows:
        cells = [_cell(values, row, table.baseline, metric) for metric in metrics]
        of_row = [result for result in results if result.variant == row]
        cells += [_cost(of_row, field) for field in ("steps", "tokens", "seconds")]
        rows.append((f"**{row}** (baseline)" if row == table.baseline else row, *cells))
    return ("", *metrics.values(), "steps", "tokens", "training s"), rows


def _cell(values: Values, row: str, baseline: str, metric: str) -> str:
    of_row = values.get(row, {}).get(metric)
    if not of_row:
        return "–"
    cell = _with_error(mean(list(of_row.values())))
    difference = _difference(values, row, baseline, metric)
    if row == baseline or difference is None:
        return cell
    mark = ("▲" if difference.value > 0 else "▼") if difference.is_clear else ""
    width = f" ± {difference.confidence:.1f}" if difference.confidence is not None else ""
    return f"{cell} ({difference.value:+.1f}{width}){mark}"


def _with_error(mean: Mean | None) -> str:
    assert mean is not None
    return f"{mean.value:.1f}" + (f" ± {mean.error:.1f}" if mean.error is not None else "")


def _difference(values: Values, row: str, baseline: str, metric: str) -> Mean | None:
    of_row, of_baseline = (values.get(name, {}).get(metric, {}) for name in (row, baseline))
    return paired_difference(of_row, of_baseline)


def _cost(results: Sequence[Result], field: str) -> str:
    known = {result.seed: getattr(result, field) for result in results if getattr(result, field) is not None}
    return f"{sum(known.values()) / len(known):,.0f}" if known else "–"


def findings(metrics: dict[str, str], table: Table, values: Values) -> list[str]:
    """One sentence per metric: the rows clearly above the baseline, clearly below it, and tied with it."""
    lines = []
    for metric, title in metrics.items():
        above, below, ties = list[str](), list[str](), list[str]()
        for row in table.rows:
            difference = _difference(values, row, table.baseline, metric)
            if row == table.baseline or difference is None or difference.error is None:
                continue  # a single seed has no standard error
            row_with_difference = f"{row} ({difference.value:+.1f})"
            place = ties if not difference.is_clear else above if difference.value > 0 else below
            place.append(row_with_difference)
        parts = [
            f"{relation} {table.baseline}: {', '.join(names)}"
            for relation, names in (("clearly above", above), ("clearly below", below), ("ties with", ties))
            if names
        ]
        if parts:
            lines.append(f"**{title}.** {'; '.join(parts)[0].upper()}{'; '.join(parts)[1:]}.")
    return lines


def draw_table(metrics: dict[str, str], table: Table, values: Values) -> Figure:
    """Points with error bars, one panel per metric.

    If the table gives an x for its rows, they are drawn over it.
    """
    rows = table.rows
    figure = Figure(figsize=(4.8 * len(metrics), 3.2 if table.x else 1.2 + 0.3 * len(rows)), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True):
        means_or_none = {row: mean(list(values[row][metric].values())) for row in rows if metric in values[row]}
        means = {row: of_row for row, of_row in means_or_none.items() if of_row is not None}
        errors = {row: of_row.error or 0.0 for row, of_row in means.items()}
        curve = [row for row in means if row in table.x]
        if table.x:
            places = _apart(table.x, curve)
            for row in curve:
                axis.errorbar(places[row], means[row].value, errors[row], fmt="o", color="C0", capsize=3)
                left = places[row] < table.x[row]
                place = {"xytext": (-5 if left else 5, 5), "ha": "right" if left else "left"}
                axis.annotate(row, (places[row], means[row].value), fontsize=7, textcoords="offset points", **place)
            axis.set(xlabel=table.x_label, ylabel=title, xticks=sorted(set(table.x.values())))
        else:
            heights = range(len(means))[::-1]
            centers = [of_row.value for of_row in means.values()]
            axis.errorbar(centers, heights, xerr=list(errors.values()), fmt="o", capsize=3)
            axis.set_yticks(list(heights), list(means))
            axis.set_xlabel(f"{title} (mean ± standard error)")
            if table.baseline in means:
                axis.axvline(means[table.baseline].value, color="0.7", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _apart(x: dict[str, float], rows: list[str]) -> dict[str, float]:
    """Row -> the x at which it is drawn. Rows with the same x are drawn side by side."""
    step = 0.06 * (max(x.values()) - min(x.values()))
    places = {}
    for row in rows:
        same = [other for other in rows if x[other] == x[row]]
        places[row] = x[row] + step * (same.index(row) - (len(same) - 1) / 2)
    return places
