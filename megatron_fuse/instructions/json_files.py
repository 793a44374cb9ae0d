"""Rows of a JSON file: one object per line, an array of objects, or an object of columns; also with gzip.

The content decides the form, not the name. There is one exception: a single object is a row in FILE.jsonl,
and may be columns in FILE.json.

{"a": 1}                    one row per line; blank lines are skipped
{"a": 2}
[{"a": 1}, {"a": 2}]        an array, on any number of lines
{"a": [1, 2]}               columns in FILE.json: lists of equal length; the whole file is in memory
                            (an object is one row if it has a value that is not a list, or a list of turns
                            under `messages` or `conversations`)
{"a": {"0": 1, "1": 2}}     columns as pandas' to_json writes them
"""

import gzip
import io
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_fuse.errors import UserError
from megatron_fuse.instructions.json_values import JsonError, array_elements, is_cut_off
from megatron_fuse.storage.files import jsonl_rows
from megatron_fuse.text_safety import brief

_GZIP = b"\x1f\x8b"
# Keys under which a row has its turns. In a column, they hold one list of turns per row.
_CONVERSATIONS = ("messages", "conversations")

Row = dict[str, Any]


def read_json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(number, row): the number of the line if there is one row per line, else of the row. Both count from 1.

    Raises UserError that names the file and the line or element that cannot be read.
    """
    with _opened(path) as file:
        begin = _first_byte(file)
        if begin == b"[":
            yield from _array(file, path)
            return
        value = _single_object(file) if begin == b"{" and _is_json(path) else None
        if value is not None:
            yield from enumerate(_rows_of(value, path), 1)
            return
        yield from jsonl_rows(file, path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    with path.open("rb") as file:
        if file.peek(2)[:2] != _GZIP:
            yield file
            return
        try:
            with io.BufferedReader(gzip.GzipFile(fileobj=file)) as unpacked:
                yield unpacked
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"{path}: cannot be unpacked ({brief(str(error))}). Write the file again."
            ) from error


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte that is not white space. The file is at its beginning before and after the call."""
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    byte = file.read(1)
    while byte.isspace():
        byte = file.read(1)
    file.seek(0)
    return byte


def _is_json(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".json")


def _array(file: BinaryIO, path: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        for row in array_elements(text):
            number += 1
            yield number, row
    except JsonError as error:
        raise UserError(
            f"{path}:{error.line}: element {number + 1} is not valid JSON ({brief(str(error))}). The file is "
            "an array, so its elements must be JSON objects."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 after {number} elements ({error.reason}). Write the file again as UTF-8."
        ) from error
    finally:
        text.detach()


def _rows_of(value: Row, path: Path) -> Iterator[Row]:
    """The rows of an object of columns. Any other object is one row."""
    columns = {key: _by_index(column) for key, column in value.items()}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        yield value
        return
    if any(_are_turns(columns.get(key, [])) for key in _CONVERSATIONS) or all(
        map(_are_turns, columns.values())
    ):
        yield value
        return
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        sizes = brief(", ".join(f"{key} {length}" for key, length in lengths.items()), 150)
        raise UserError(
            f"{path}: the columns of the object have different lengths ({sizes}). Write one object per row."
        )
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _single_object(file: BinaryIO) -> Row | None:
    """The object, if the file consists of one object; else None. Then the reader of lines checks the file.

    The file is at its beginning before and after the call. Only the first object is parsed. If the first line
    holds a whole object, only that line is parsed.
    """
    try:
        first = file.readline()
        while first and not first.strip(BOM_UTF8).strip():
            first = file.readline()
        try:
            value = _parsed(first)
        except json.JSONDecodeError as error:
            if not is_cut_off(error, error.doc):
                return None
            value = _parsed(first + file.read())
        return value if isinstance(value, dict) and not any(line.strip() for line in file) else None
    except (ValueError, RecursionError):
        return None
    finally:
        file.seek(0)


def _parsed(data: bytes) -> Any:
    return json.loads(data.decode("utf-8-sig"))


def _by_index(column: Any) -> Any:
    """pandas' {"0": value, "1": value} as a list; any other value as it is."""
    if isinstance(column, dict) and column and list(column) == [str(index) for index in range(len(column))]:
        return list(column.values())
    return column


def _are_turns(column: list[Any]) -> bool:
    """Whether a list is the conversation of one row, a list of {role, content}, and not a column."""
    return bool(column) and all(
        isinstance(turn, dict) and any(isinstance(v, str) for v in turn.values()) for turn in column
    )
