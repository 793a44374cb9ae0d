"""The table of a comparison as text for a terminal, as Markdown and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fuse.evaluation.chart import draw_comparison
from megatron_fuse.evaluation.comparison import Comparison, Difference, Value
from megatron_fuse.reporting.layout import Table, markdown_table, save_picture, save_text, text_table
from megatron_fuse.storage import write_json

EXPLANATION = (
    "In per cent, ± one standard error. Differences are means over the same questions; `better` and `worse` "
    "stand beyond two of their standard errors, all others are ties."
)


def write_comparison(comparison: Comparison, made_from: Mapping[str, Any], output: Path) -> None:
    """Writes OUTPUT/evaluation.{json,md,png}. made_from: tasks and fingerprints, for the JSON file."""
    write_json(output / "evaluation.json", {"made_from": made_from, **_numbers(comparison)})
    save_text(output / "evaluation.md", comparison_markdown(comparison))
    save_picture(draw_comparison(comparison), output / "evaluation.png")


def comparison_text(comparison: Comparison) -> str:
    notes = [f"  {note}" for note in comparison.notes]
    return "\n".join([*text_table(comparison_table(comparison)), "", EXPLANATION, *notes])


def comparison_markdown(comparison: Comparison) -> str:
    notes = [f"- {note}" for note in comparison.notes]
    return "\n".join(
        [*markdown_table(comparison_table(comparison)), "", EXPLANATION, *([""] if notes else []), *notes, ""]
    )


def comparison_table(comparison: Comparison) -> Table:
    """One row per benchmark.

    Each model but the baseline has a further column: its difference to the baseline.
    """
    heading = ["", "questions"]
    for model in comparison.models:
        heading += [model] if model == comparison.baseline else [model, f"{model} - {comparison.baseline}"]
    rows = []
    for row in comparison.rows:
        cells = [row.benchmark.heading, str(row.questions or "-")]
        for model in comparison.models:
            cells.append(_value_text(row.values[model]))
            if model != comparison.baseline:
                cells.append(_difference_text(row.differences[model]))
        rows.append(cells)
    return heading, rows


def _value_text(value: Value) -> str:
    if value.value is None:
        return "-"
    error = "" if value.standard_error is None else f" ± {100 * value.standard_error:.1f}"
    return f"{100 * value.value:.1f}{error}"


def _difference_text(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{100 * difference.value:+.1f} ± {100 * difference.standard_error:.1f} {difference.verdict}"


def _numbers(comparison: Comparison) -> dict[str, Any]:
    rows = [
        {
            "task": row.benchmark.name,
            "shots": row.benchmark.shots,
            "metric": row.benchmark.metric,
            "questions": row.questions,
            "values": {model: asdict(value) for model, value in row.values.items()},
            "differences": {model: value and asdict(value) for model, value in row.differences.items()},
        }
        for row in comparison.rows
    ]
    return {
        "models": comparison.models,
        "baseline": comparison.baseline,
        "rows": rows,
        "notes": comparison.notes,
    }
