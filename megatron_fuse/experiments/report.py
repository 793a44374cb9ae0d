"""The tables and maps of an experiment as Markdown with pictures, made from its CSV file alone.

Every number is a mean over seeds ± its standard error. Beside it is the difference to the baseline,
paired by seed, with its 95 % confidence interval. ▲ and ▼ mark the differences that are clear in the whole
table (statistics.py); the others are called ties.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from megatron_fuse.experiments.comparison import Comparison, Values, baselines, comparisons
from megatron_fuse.experiments.experiment import Experiment, Map, Table, run_name
from megatron_fuse.experiments.numbers import MARKS, change, with_error, with_quotes
from megatron_fuse.experiments.results import Result
from megatron_fuse.reporting.layout import Table as Cells
from megatron_fuse.reporting.layout import markdown_table, save_picture, save_text

_NAMED = 4  # of the runs that a table lacks

LEGEND = (
    "Means over seeds ± standard error. In brackets the difference to the baseline, paired by seed, ± half "
    "of its 95 % confidence interval (moderated t). ▲ and ▼: clearly above or below the baseline by Holm's "
    "procedure at 5 % over all rows of a table, for each metric; all other differences are ties. A * marks "
    "the rows whose difference was the question before the runs were made: they are a group of their own, "
    "and both groups then share the 5 %."
)


@dataclass(frozen=True)
class Reported:
    """An experiment with its results, and the command that makes them."""

    experiment: Experiment
    results: Sequence[Result]
    command: str


def write_report(reported: Sequence[Reported], path: Path) -> None:
    """Writes one Markdown file with a section for every table and map whose runs all have a result.

    It names the other tables. Pictures are written beside the CSV file of each experiment.
    """
    parts = []
    for each in reported:
        values: dict[str, dict[str, dict[int, float]]] = {}
        for result in each.results:
            values.setdefault(result.variant, {}).setdefault(result.metric, {})[result.seed] = result.value
        preface = with_quotes(each.experiment.preface.strip(), each.experiment, values)
        parts += [preface] * bool(preface)
        parts += [LEGEND] * (each is reported[0])
        unfinished = []
        shown: dict[str, Table | Map] = {**each.experiment.maps, **each.experiment.tables}
        for name, table in shown.items():
            lacking = [run for run in baselines(table) if run not in values]
            if lacking:
                more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
                named = ", ".join(lacking[:_NAMED])
                unfinished.append(f"- {table.title} (`--only {name}`): {named}{more}")
            else:
                parts.append(_section(each, name, table, values, path))
        if unfinished:
            parts.append(
                "\n".join(["Not in this report, as some of their rows have no result:", "", *unfinished])
            )
    save_text(path, "\n\n".join(parts) + "\n")


def _section(reported: Reported, name: str, table: Table | Map, values: Values, path: Path) -> str:
    if isinstance(table, Map):
        return _map_section(reported, name, table, values, path)
    return _table_section(reported, name, table, values, path)


def _table_section(reported: Reported, name: str, table: Table, values: Values, path: Path) -> str:
    experiment = reported.experiment
    compared = comparisons(experiment, table, values)
    runs = {row: run_name(table.scenario, row) for row in table.rows}
    of_table = [result for result in reported.results if result.variant in runs.values()]
    picture = experiment.results.with_name(f"{experiment.results.stem}-{name}.png")
    save_picture(draw_table(experiment.metrics, table, compared), picture)
    missing = [row for row, run in runs.items() if any(run not in each.means for each in compared.values())]
    paragraphs = [
        f"## {table.title}",
        "\n".join(markdown_table(_rows(experiment.metrics, table, compared, of_table))),
        *([f"–: not measured ({', '.join(missing)})."] if missing else []),
        *findings(experiment.metrics, table, compared),
        *([with_quotes(table.note.strip(), experiment, values)] if table.note else []),
        f"![{table.title}]({os.path.relpath(picture, path.parent)})",
        _origin(name, reported.command, of_table),
    ]
    return "\n\n".join(paragraphs)


def _map_section(reported: Reported, name: str, table: Map, values: Values, path: Path) -> str:
    """One Markdown table and one heat map per metric: a row per scenario, a column per variant."""
    experiment = reported.experiment
    compared = comparisons(experiment, table, values)
    baseline_of = baselines(table)
    of_map = [result for result in reported.results if result.variant in baseline_of]
    picture = experiment.results.with_name(f"{experiment.results.stem}-{name}.png")
    save_picture(draw_map(experiment.metrics, table, compared), picture)
    paragraphs = [f"## {table.title}"]
    for metric, title in experiment.metrics.items():
        heading = (
            "",
            f"{table.baseline}",
            *(f"{row}*" if row in table.expected else row for row in table.rows),
        )
        cells = [_map_row(table, scenario, compared[metric]) for scenario in table.scenarios]
        if any(cell != "–" for row in cells for cell in row[1:]):
            paragraphs += [
                f"**{title}**{_power(compared[metric])}",
                "\n".join(markdown_table((heading, cells))),
            ]
    paragraphs += [with_quotes(table.note.strip(), experiment, values)] if table.note else []
    paragraphs += [f"![{table.title}]({os.path.relpath(picture, path.parent)})"]
    return "\n\n".join([*paragraphs, _origin(name, reported.command, of_map)])


def _map_row(table: Map, scenario: str, comparison: Comparison) -> list[str]:
    baseline = comparison.means.get(run_name(scenario, table.baseline))
    runs = [run_name(scenario, row) for row in table.rows]
    return [
        scenario,
        with_error(baseline) if baseline else "–",
        *(change(comparison, run) or "–" for run in runs),
    ]


def _origin(name: str, command: str, results: Sequence[Result]) -> str:
    """The origin of the numbers of a table: command, seeds, split, commit, machine and date."""

    def distinct(field: str) -> str:
        return ", ".join(map(str, sorted({getattr(result, field) for result in results})))

    return (
        f"`{command} --only {name}`; seeds {distinct('seed')}; split {distinct('split')}; commit "
        f"{distinct('commit')}; {distinct('machine')}; {distinct('date')}."
    )


def _rows(
    metrics: dict[str, str], table: Table, compared: dict[str, Comparison], results: Sequence[Result]
) -> Cells:
    """One row per variant. The last columns hold the cost of its training."""
    rows = []
    for row in table.rows:
        run = run_name(table.scenario, row)
        cells = [_cell(compared[metric], run) for metric in metrics]
        of_row = [result for result in results if result.variant == run]
        cells += [_cost(of_row, field) for field in ("steps", "tokens", "seconds")]
        label = (
            f"**{row}** (baseline)" if row == table.baseline else f"{row}*" if row in table.expected else row
        )
        rows.append((label, *cells))
    return ("", *metrics.values(), "steps", "tokens", "training s"), rows


def _cell(comparison: Comparison, run: str) -> str:
    if run not in comparison.means:
        return "–"
    text = change(comparison, run)
    return with_error(comparison.means[run]) + (
        f" ({text[:-1]}){text[-1]}" if text[-1:] in MARKS else f" ({text})" if text else ""
    )


def _cost(results: Sequence[Result], field: str) -> str:
    known = {result.seed: getattr(result, field) for result in results if getattr(result, field) is not None}
    return f"{sum(known.values()) / len(known):,.0f}" if known else "–"


def findings(metrics: dict[str, str], table: Table, compared: dict[str, Comparison]) -> list[str]:
    """One paragraph per metric: the rows clearly above the baseline, clearly below it, and tied with it."""
    lines = []
    for metric, title in metrics.items():
        above, below, ties = list[str](), list[str](), list[str]()
        for row in table.rows:
            run = run_name(table.scenario, row)
            difference = compared[metric].differences.get(run)
            if difference is None or difference.error is None:
                continue  # a single seed has no standard error
            place = ties if run not in compared[metric].clear else above if difference.value > 0 else below
            place.append(f"{row} ({difference.value:+.1f})")
        parts = [
            f"{relation} {table.baseline}: {', '.join(names)}"
            for relation, names in (("clearly above", above), ("clearly below", below), ("ties with", ties))
            if names
        ]
        if parts:
            sentence = "; ".join(parts)
            lines.append(f"**{title}.** {sentence[0].upper()}{sentence[1:]}.{_power(compared[metric])}")
    return lines


def _power(comparison: Comparison) -> str:
    """A sentence on what the table could not have seen."""
    smallest = comparison.smallest_seen
    if smallest is None:
        return ""
    return (
        f" A true difference of {smallest:.1f} would have been found in 80 % of such tables, a smaller "
        "one less often."
    )


def draw_table(metrics: dict[str, str], table: Table, compared: dict[str, Comparison]) -> Figure:
    """Points with error bars, one panel per metric.

    If the table gives an x for its rows, they are drawn over it.
    """
    rows = table.rows
    figure = Figure(
        figsize=(4.8 * len(metrics), 3.2 if table.x else 1.2 + 0.3 * len(rows)), layout="constrained"
    )
    for axis, (metric, title) in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True
    ):
        runs = {row: run_name(table.scenario, row) for row in rows}
        means = {
            row: compared[metric].means[run] for row, run in runs.items() if run in compared[metric].means
        }
        errors = {row: of_row.error or 0.0 for row, of_row in means.items()}
        curve = [row for row in means if row in table.x]
        if table.x:
            places = _apart(table.x, curve)
            for row in curve:
                axis.errorbar(places[row], means[row].value, errors[row], fmt="o", color="C0", capsize=3)
                left = places[row] < table.x[row]
                place = {"xytext": (-5 if left else 5, 5), "ha": "right" if left else "left"}
                axis.annotate(
                    row, (places[row], means[row].value), fontsize=7, textcoords="offset points", **place
                )
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


def draw_map(metrics: dict[str, str], table: Map, compared: dict[str, Comparison]) -> Figure:
    """A heat map per metric: the differences to the baseline of the same scenario, clear ones in bold."""
    rows, columns = len(table.scenarios), len(table.rows)
    size = (2.2 + 0.75 * columns * len(metrics) + 0.8 * len(metrics), 1.6 + 0.38 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
        differences = compared[metric].differences
        cells = [[run_name(scenario, row) for row in table.rows] for scenario in table.scenarios]
        values = [
            [differences[run].value if run in differences else float("nan") for run in line] for line in cells
        ]
        largest = max([abs(value) for line in values for value in line if value == value], default=1.0) or 1.0
        image = axis.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        for y, line in enumerate(cells):
            for x, run in enumerate(line):
                if run in differences:
                    value, is_clear = differences[run].value, run in compared[metric].clear
                    dark = abs(value) > 0.6 * largest
                    weight = "bold" if is_clear else "normal"
                    axis.text(
                        x,
                        y,
                        f"{value:+.1f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        weight=weight,
                        color="w" if dark else "k",
                    )
        axis.set_xticks(range(columns), table.rows, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(rows), table.scenarios, fontsize=8)
        axis.set_title(f"{title}: difference to {table.baseline}", fontsize=9)
        figure.colorbar(image, ax=axis, fraction=0.05)
    return figure
