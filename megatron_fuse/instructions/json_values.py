"""Reads the elements of a JSON array one at a time.

Only as much of the file is in memory as the longest element needs.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20  # characters read at once

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16  # characters: -Infinity, \ud83d\ude42


class JsonError(ValueError):
    """The text is not valid JSON. line: the number of the line, from 1."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


class _Window:
    """The part of a text that is in memory. The part from `_at` on is not read yet."""

    def __init__(self, file: TextIO, chunk: int) -> None:
        self._file, self._chunk = file, chunk
        self._text, self._at, self._first_line = "", 0, 1
        self._decoder = json.JSONDecoder()

    @property
    def line(self) -> int:
        return self._line_at(self._at)

    def next(self) -> str:
        """The next character that is not white space; "" at the end. The character is not consumed."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing as well
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def object(self) -> dict[str, Any]:
        """The object that begins at the next character, a brace. Raises JsonError."""
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                if not (is_cut_off(error, self._text) and self._more()):
                    raise JsonError(error.msg, self._line_at(error.pos)) from error
            except (ValueError, RecursionError) as error:  # an integer of too many digits; nested too deeply
                raise JsonError(str(error), self.line) from error

    def _line_at(self, place: int) -> int:
        return self._first_line + self._text.count("\n", 0, place)

    def _more(self) -> bool:
        """Reads more text. Returns False at the end of the file.

        It reads as much as is in memory already. So a long value is parsed only a few times, and not for
        every chunk.
        """
        self._first_line = self.line
        rest = self._text[self._at :]
        new = self._file.read(max(self._chunk, len(rest)))
        self._text, self._at = rest + new, 0
        return bool(new)


def is_cut_off(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could make the value valid: the error is at the end, or in an unfinished string."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_WORD


def array_elements(file: TextIO, chunk: int = CHUNK) -> Iterator[dict[str, Any]]:
    """The objects of the array in a file.

    Raises JsonError at the first thing that is not part of such an array, after the objects before it.
    """
    window = _Window(file, chunk)
    if window.next() != "[":
        raise JsonError("no array", window.line)
    window.skip()
    separator = window.next()
    while separator != "]":
        if window.next() != "{":
            raise JsonError("an object is missing", window.line)
        yield window.object()
        separator = window.next()
        if separator not in ("]", ","):
            raise JsonError("a comma or the array's closing bracket is missing", window.line)
        if separator == ",":
            window.skip()
    window.skip()
    if window.next():
        raise JsonError("there is more text after the array", window.line)
