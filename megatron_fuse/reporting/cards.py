"""Cards of a page: one prompt each, with the answers of several models side by side. Long texts are folded."""

from megatron_fuse.reporting.layout import escape

CARD_STYLE = """
.card { border: 1px solid #999; border-radius: 6px; margin: 1.2em 0; padding: .8em 1.2em 1em; }
.card h3 { margin: 0 0 .1em; }
.card table { font-size: .93em; }
.card td:last-child, .card th:last-child { text-align: left; }
.won { display: inline-block; background: #222; color: #fff; border-radius: 3px; padding: 0 .4em; margin-left: .4em; white-space: nowrap; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.instruction { background: #f3f3f3; padding: .5em .8em; margin: .5em 0; }
.answers { display: grid; gap: .8em 1.2em; align-items: start; }
.answer { min-width: 0; border-left: 6px solid; padding-left: .7em; font-size: .93em; }
.truth { border-left-style: double; }
details { display: inline; } summary { cursor: pointer; list-style: none; display: inline; }
summary .more { color: #0050a0; text-decoration: underline; white-space: nowrap; }
details[open] summary .more { display: none; }
@media print {
  .card { break-inside: avoid; padding: .5em .8em; margin: .7em 0; font-size: 8.5pt; line-height: 1.35; }
  .card p, .card table { margin: .25em 0; }
  summary .more { color: #555; text-decoration: none; }
}
"""


def folded(text: str, size: tuple[int, int]) -> str:
    """The beginning, of at most this many characters and lines; the rest can be opened and goes on where
    it ends.
    """
    characters, lines = size
    if len(text) <= 1.2 * characters and text.count("\n") <= lines:
        return escape(text)
    cut = len("\n".join(text.split("\n")[:lines]))
    if cut > characters:  # between two words, where there are words
        cut = 1 + max(text.rfind(space, characters // 2, characters) for space in " \n") or characters
    more = f'<span class="more">… {len(text) - cut:,} more characters</span>'
    return f"<details><summary>{escape(text[:cut])}{more}</summary>{escape(text[cut:])}</details>"
