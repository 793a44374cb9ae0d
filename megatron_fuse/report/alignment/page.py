"""The alignment report as text for a terminal, and as one HTML page that needs nothing beside it."""

from typing import Any

from megatron_fuse.report.alignment.charts import MATCH_NAMES
from megatron_fuse.reporting.layout import (
    Table,
    escape,
    html_page,
    html_picture,
    html_table,
    percent,
    text_table,
)

_SHOWN = 60  # characters of a span in the terminal


def alignment_text(report: dict[str, Any]) -> str:
    """The report for a terminal, one block per source and mode."""
    blocks = [_heading(report)]
    for teacher in report["teachers"]:
        spans = [f"  {line}" for line in text_table(_spans_table(teacher, shown=_SHOWN))]
        blocks.append(
            "\n".join(
                [
                    _title(teacher),
                    *(f"  {line}" for line in _sentences(teacher)),
                    *text_table(_rows_table(teacher)),
                    *(["  longest unmatched spans:", *spans] if teacher["longest_unmatched"] else []),
                ]
            )
        )
    return "\n\n".join(blocks)


def alignment_page(report: dict[str, Any], chart: bytes) -> str:
    """The report as HTML; the chart, a PNG, becomes part of the page."""
    parts = [
        f"<h1>Alignment</h1><p>{escape(_heading(report))}</p>",
        html_picture(chart, "shares of aligned tokens and mass kept"),
    ]
    for teacher in report["teachers"]:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in _sentences(teacher))
        parts.append(f"<h2>{escape(_title(teacher))}</h2><ul>{items}</ul>{html_table(_rows_table(teacher))}")
        if teacher["longest_unmatched"]:
            parts.append("<h3>Longest unmatched spans</h3>" + html_table(_spans_table(teacher), "texts"))
    return html_page("Alignment report", "".join(parts))


def _heading(report: dict[str, Any]) -> str:
    return (
        f"{report['fusion_data']}: vocabulary map {report['vocabulary_map']}, unmatched "
        f"{report['unmatched']}, temperature {report['temperature']:g}"
    )


def _title(teacher: dict[str, Any]) -> str:
    return f"{teacher['source']}, {teacher['mode']} mode"


def _sentences(teacher: dict[str, Any]) -> list[str]:
    examples, vocabulary, captured = teacher["examples"], teacher["vocabulary"], teacher["captured"]
    return [
        f"examples: the source has read {examples['read']:,} of {examples['all']:,}; "
        f"{percent(examples['whole'])} of these have every byte aligned",
        f"vocabulary: {percent(vocabulary['exact'])} of {vocabulary['tokens']:,} tokens have a target token "
        f"of equal bytes; {percent(captured['exact_mass'])} of the captured mass lies on them",
        f"mass: {percent(captured['mass'])} of a captured row is stored, "
        f"{percent(teacher['rows']['all']['mass'])} of an "
        f"exactly aligned one; the label's own mass changes {percent(teacher['label_mass'])} of the rows",
    ]


def _rows_table(teacher: dict[str, Any]) -> Table:
    return ("label", "tokens", *MATCH_NAMES.values(), "mass kept"), [
        [name, f"{row['rows']:,}", *(percent(row[match]) for match in MATCH_NAMES), percent(row["mass"])]
        for name, row in teacher["rows"].items()
    ]


def _spans_table(teacher: dict[str, Any], shown: int | None = None) -> Table:
    """shown: characters of a text, as a literal; default: all of it, as it is."""
    spans = teacher["longest_unmatched"]
    return ("text", "tokens", "bytes", "example"), [
        [
            span["text"]
            if shown is None
            else repr(span["text"][:shown]) + "..." * (len(span["text"]) > shown),
            f"{span['tokens']:,}",
            f"{span['bytes']:,}",
            span["example"],
        ]
        for span in spans
    ]
