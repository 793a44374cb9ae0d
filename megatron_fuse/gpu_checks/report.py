"""The table of a run as Markdown."""

from collections.abc import Sequence
from datetime import date

from megatron_fuse.gpu_checks.rows import Row

_HEADS = ("check", "what", "value", "unit", "limit", "")


def markdown(rows: Sequence[Row]) -> str:
    """A line with the date and the numbers of rows that are ok, failed or not run; then the table."""
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("ok", "FAILED", "not run")}
    lines = [
        _line(_HEADS),
        _line(["---", "---", "---:", "---", "---", "---"]),
        *(_line(_cells(row)) for row in rows),
    ]
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([f"{date.today().isoformat()}: {summary}", "", *lines, ""])


def _cells(row: Row) -> list[str]:
    verdict = f"{row.verdict}: {row.reason}" if row.reason else row.verdict
    return [row.check, row.what, readable(row.value), row.unit, row.limit, verdict]


def readable(value: float | str | None) -> str:
    """A number with four significant digits; a text as it is; empty for None."""
    if not isinstance(value, int | float):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
