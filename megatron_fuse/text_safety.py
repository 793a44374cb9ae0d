"""User text on a terminal: what would move the cursor, hide or reorder text becomes a visible escape."""

import unicodedata
from typing import TextIO

# Controls, formats (bidirectional, zero width), surrogates, line and paragraph separators.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_PROSE = "\n\t\u200c\u200d"  # the joiners are part of the spelling of Persian, of Hindi and of emoji


def printable(text: str, *, prose: bool = False) -> str:
    """The text with every control, bidirectional, zero-width and separator character and every lone surrogate as an escape.

    `\\x1b`, `\\u202e`, `\\n`. The result is one line that a terminal shows as it is and that UTF-8 can encode. prose: keep
    newlines, tabs and the zero-width joiners, for running text. Printable texts come back unchanged; a backslash is not doubled,
    so escapes are for reading, not for parsing back.
    """
    if text.isprintable():
        return text
    kept = _PROSE if prose else ""
    return "".join(c if c in kept or unicodedata.category(c) not in _UNSAFE else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def brief(text: str, limit: int = 300) -> str:
    """Printable text of at most `limit` characters on one line, for what a library says in the middle of a message."""
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def say(text: str, file: TextIO | None = None) -> None:
    """Prints what a command has to say, at once, and nothing that a terminal would obey."""
    print(printable(text, prose=True), file=file, flush=True)
