"""The alignment report as text for a terminal, and as one HTML page that needs nothing beside it."""

import base64
import html
from collections.abc import Sequence
from typing import Any

from megatron_fuse.report.charts import MATCH_NAMES

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; }
"""
_SHOWN = 60  # characters of a span in the terminal

_Table = tuple[Sequence[str], list[Sequence[str]]]  # heading, rows


def alignment_text(report: dict[str, Any]) -> str:
    """The report for a terminal, one block per source and mode."""
    blocks = [_heading(report)]
    for teacher in report["teachers"]:
        spans = [f"  {line}" for line in _columns(_spans_table(teacher, shown=_SHOWN))]
        blocks.append(
            "\n".join(
                [
                    _title(teacher),
                    *(f"  {line}" for line in _facts(teacher)),
                    *_columns(_rows_table(teacher)),
                    *(["  longest unmatched spans:", *spans] if teacher["longest_unmatched"] else []),
                ]
            )
        )
    return "\n\n".join(blocks)


def alignment_page(report: dict[str, Any], chart: bytes) -> str:
    """The report as HTML; the chart, a PNG, becomes part of the page. Every text of the data is escaped."""
    picture = base64.b64encode(chart).decode()
    parts = [
        f"<h1>Alignment</h1><p>{html.escape(_heading(report))}</p>",
        f'<img alt="shares of aligned tokens and mass kept" src="data:image/png;base64,{picture}">',
    ]
    for teacher in report["teachers"]:
        facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in _facts(teacher))
        parts.append(f"<h2>{html.escape(_title(teacher))}</h2><ul>{facts}</ul>{_html_table(_rows_table(teacher))}")
        if teacher["longest_unmatched"]:
            parts.append(f"<h3>Longest unmatched spans</h3>{_html_table(_spans_table(teacher))}")
    title = "<title>Alignment report</title>"
    head = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{title}<style>{_STYLE}</style></head>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _heading(report: dict[str, Any]) -> str:
    return (
        f"{report['fusion_data']}: vocabulary map {report['vocabulary_map']}, unmatched {report['unmatched']}, "
        f"temperature {report['temperature']:g}"
    )


def _title(teacher: dict[str, Any]) -> str:
    return f"{teacher['source']}, {teacher['mode']} mode"


def _facts(teacher: dict[str, Any]) -> list[str]:
    examples, vocabulary, captured = teacher["examples"], teacher["vocabulary"], teacher["captured"]
    return [
        f"examples: the source has read {examples['read']:,} of {examples['all']:,}; "
        f"{_percent(examples['whole'])} of these have every byte aligned",
        f"vocabulary: {_percent(vocabulary['exact'])} of {vocabulary['tokens']:,} tokens have a target token of equal bytes; "
        f"{_percent(captured['exact_mass'])} of the captured mass lies on them",
        f"mass: {_percent(captured['mass'])} of a captured row is stored, {_percent(teacher['rows']['all']['mass'])} of an "
        f"exactly aligned one; the label's own mass changes {_percent(teacher['label_mass'])} of the rows",
    ]


def _rows_table(teacher: dict[str, Any]) -> _Table:
    return ("label", "tokens", *MATCH_NAMES.values(), "mass kept"), [
        [name, f"{row['rows']:,}", *(_percent(row[match]) for match in MATCH_NAMES), _percent(row["mass"])]
        for name, row in teacher["rows"].items()
    ]


def _spans_table(teacher: dict[str, Any], shown: int | None = None) -> _Table:
    """shown: characters of a text, as a literal; default: all of it, as it is."""
    spans = teacher["longest_unmatched"]
    return ("text", "tokens", "bytes", "example"), [
        [
            span["text"] if shown is None else repr(span["text"][:shown]) + "..." * (len(span["text"]) > shown),
            f"{span['tokens']:,}",
            f"{span['bytes']:,}",
            span["example"],
        ]
        for span in spans
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _columns(table: _Table) -> list[str]:
    heading, rows = table
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = []
    for row in (heading, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines


def _html_table(table: _Table) -> str:
    heading, rows = table
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heading)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
