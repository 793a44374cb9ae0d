"""The layout of all reports: the HTML page and its style, tables for page and terminal, writing to disk.

A page is one file without others: the pictures are part of it. Every text of the data is escaped.
"""

import base64
import warnings
from collections.abc import Sequence
from html import escape as escape_html
from pathlib import Path

from matplotlib.figure import Figure

from megatron_fuse.storage import temporary_then_rename
from megatron_fuse.text_safety import printable

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Liberation Sans", sans-serif; max-width: 74em; margin: 2em auto; padding: 0 1.5em; color: #222; }
h1 { margin-bottom: .2em; }
h2 { margin: 2em 0 .4em; border-bottom: 1px solid #bbb; }
p, li { max-width: 62em; }
table { border-collapse: collapse; margin: .8em 0; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
table.texts td:first-child { white-space: pre-wrap; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; margin: .8em 0; }
.note { color: #555; }
@media print {
  body { font-size: 9.5pt; margin: 0; max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3 { break-after: avoid; }
  img, tr, table.numbers { break-inside: avoid; }
}
"""

_DPI = 160  # of pictures on the disk and on paper
_PIXELS_PER_INCH = 102  # of pictures on the screen: a picture of 11 inches fills a page of 1280 px

# Heading, rows; the first column holds names, the others numbers.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def escape(text: str) -> str:
    """A text of the data for an HTML page.

    Characters of HTML, and those that hide or reorder text, become visible.
    """
    return escape_html(printable(text, prose=True))


def html_page(title: str, body: str, style: str = "") -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title>'
    )
    return (
        "<!DOCTYPE html>\n<html "
        f'lang="en"><head>{head}<style>{STYLE}{style}</style></head>\n<body>{body}</body></html>\n'
    )


def html_table(table: Table, kind: str = "numbers") -> str:
    """A table as HTML. kind: `texts` if the first column holds texts of any length, else `numbers`."""
    heading, rows = table
    head = "".join(f"<th>{escape(name)}</th>" for name in heading)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n'


def html_picture(png: bytes, description: str) -> str:
    """A PNG as an HTML element. description: the alternative text, for readers who cannot see the picture."""
    data = base64.b64encode(png).decode()
    width = int.from_bytes(png[16:20]) * _PIXELS_PER_INCH // _DPI  # a PNG's first chunk begins with its width
    return f'<img width="{width}" alt="{escape(description)}" src="data:image/png;base64,{data}">\n'


def text_table(table: Table) -> list[str]:
    """The lines of a table for a terminal."""
    heading, *rows = [[printable(cell) for cell in row] for row in (table[0], *table[1])]
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = []
    for row in (heading, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def markdown_table(table: Table) -> list[str]:
    """The lines of a table for a Markdown file."""
    heading, rows = table
    rule = ["---", *("---:" for _ in heading[1:])]
    return [f"| {' | '.join(map(_markdown_cell, row))} |" for row in (heading, rule, *rows)]


def _markdown_cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def save_picture(figure: Figure, path: Path) -> bytes:
    """Writes a figure as PNG and returns its bytes. The same figure gives the same bytes."""
    with temporary_then_rename(path) as temporary, warnings.catch_warnings():
        # matplotlib warns of characters that its font lacks, and draws boxes. The page shows them as text.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(temporary, format="png", dpi=_DPI)
        return temporary.read_bytes()


def save_text(path: Path, text: str) -> None:
    with temporary_then_rename(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
