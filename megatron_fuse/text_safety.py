"""User text on a terminal: characters that move the cursor, hide or reorder text become visible escapes."""

import unicodedata

# Controls, formats (bidirectional, zero width), surrogates, line and paragraph separators.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_PROSE = "\n\t\u200c\u200d"  # the joiners are part of the spelling of Persian, of Hindi and of emoji


def printable(text: str, *, prose: bool = False) -> str:
    """The text with every control, bidirectional, zero-width and separator character and every lone surrogate
    as an escape.

    Escapes look like `\\x1b`, `\\u202e`, `\\n`. The result is one line that a terminal shows as it is and
    that UTF-8 can encode. prose: keep newlines, tabs and the zero-width joiners, for running text. A
    printable text comes back unchanged. A backslash is not doubled: the escapes are for reading, and cannot
    be parsed back.
    """
    if text.isprintable():
        return text
    kept = _PROSE if prose else ""
    return "".join(c if c in kept or unicodedata.category(c) not in _UNSAFE else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def brief(text: str, limit: int = 300) -> str:
    """The text as one printable line of at most `limit` characters, to quote a library's message."""
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def say(text: str) -> None:
    """Prints a result of a command at once (flushed), without characters that control the terminal."""
    print(printable(text, prose=True), flush=True)
