"""A strict reader for JSON files of models that others have made.

Python's `json` accepts a key twice (the last one wins), numbers of any length and halves of surrogate pairs,
and overflows the stack on deep nesting. This module raises UserError for all of these, with the file and the
key or line.
"""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import quoted
from megatron_fuse.text_safety import brief

MOST_BYTES = 64 << 20  # the index of the largest published model has 10 MB
_MOST_DEPTH = 64
_MOST_DIGITS = 1000  # the largest float has 309 digits before the point


class _BadValue(ValueError):
    """A problem that a hook of the parser has found.

    The hook does not know the line, so it passes the token on.
    """

    def __init__(self, problem: str, token: str) -> None:
        super().__init__(problem)
        self.token = token


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object of a file.

    Raises UserError, naming the file and the key or line, for any other content.
    """
    return parse_object(read_small_file(path, most_bytes), str(path))


def read_small_file(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises UserError if it is missing, too large, unreadable, or no regular file."""
    size = file_size(path)
    if size > most_bytes:
        raise UserError(
            f"{path} has {size} bytes, more than {most_bytes}, so it is another file. Put the right file "
            "there."
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def file_size(path: Path) -> int:
    """Size in bytes. Raises UserError unless it is a regular file: reading a pipe might never end."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{path} is {'a directory' if path.is_dir() else 'not a regular file'}. Put the file there."
        )
    return status.st_size


def parse_object(text: bytes, place: str) -> dict[str, Any]:
    """The JSON object in a text. place: its file, for errors.

    Raises UserError, naming the key or line, for other content.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
    except _BadValue as error:
        raise UserError(f"{place}: {error}{_line_of(text, error.token)}") from error
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise UserError(f"{place}: line {line} is not UTF-8 ({error.reason})") from error
    except RecursionError:
        raise UserError(f"{place}: {_too_deep(text)}") from None
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {brief(str(error))}") from error
    if not isinstance(content, dict):
        raise UserError(f"{place}: holds a JSON {type(content).__name__}, but must hold an object")
    for path, value, depth in _values(content):
        if depth > _MOST_DEPTH:
            raise UserError(f"{place}: {_named(path)}: {_too_deep(text)}")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(
                f"{place}: {_named(path)} is {quoted(value)}: half of a surrogate pair is not a character"
            )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadValue(f"the key {quoted(key)} is given twice", "")
            seen.add(key)
    return content


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _BadValue(f"there is an integer of {len(digits)} digits", digits)
    return int(digits)


# The path of a value: the path of the mapping that holds it, and its key in that mapping. A chain is cheap to
# make for every value, and only the few paths in errors are ever written out.
_Path = tuple["_Path", str] | None


def _values(content: dict[str, Any]) -> Iterator[tuple[_Path, Any, int]]:
    """(path, value, depth) of all values and keys, without recursion."""
    waiting: list[tuple[_Path, Any, int]] = [(None, content, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        yield path, value, depth
        if depth > _MOST_DEPTH:
            continue
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, dict | list | str):
                    waiting.append(((path, key), inner, depth + 1))
                if not key.isascii():
                    yield (path, key), key, depth
        elif isinstance(value, list):
            waiting += [(path, inner, depth + 1) for inner in value if isinstance(inner, dict | list | str)]


def _named(path: _Path) -> str:
    keys = []
    while path is not None:
        path, key = path
        keys.append(brief(key, 60))
    return ".".join(reversed(keys))


def _line_of(text: bytes, token: str) -> str:
    return f" in line {text[: text.find(token.encode())].count(10) + 1}" if token else ""


def _too_deep(text: bytes) -> str:
    """The line in which brackets are nested too deeply.

    Brackets in strings count too: it is only for a message.
    """
    depth = 0
    for index, byte in enumerate(text):
        depth += (byte in b"[{") - (byte in b"]}")
        if depth > _MOST_DEPTH:
            return f"nested more than {_MOST_DEPTH} deep in line {text[:index].count(10) + 1}"
    return "nested too deeply"
