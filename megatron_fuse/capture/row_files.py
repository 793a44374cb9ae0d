"""Reads rows of a JSONL or Parquet file by their `id`.

They come in the file's order and one at a time, so that the use of memory stays constant. The file is indexed
once: the place of each id. A file that is sorted like the examples is then read from front to back.
"""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.storage import parse_row
from megatron_fuse.storage.records import quoted
from megatron_fuse.text_safety import brief

# For Parquet: the rows that are decoded together, and the bytes of every column that are read together.
_BATCH, _BUFFER = 32, 2**20
# A line that begins with its id is indexed without parsing the whole line.
_LEADING_ID = re.compile(rb'\s*\{\s*"id"\s*:\s*("(?:[^"\\]|\\.)*"|\d+)\s*[,}]')


@dataclass(frozen=True)
class FileRow:
    """A row of the file. place: file and line or row, for errors."""

    id: str
    place: str
    content: dict[str, Any]


class RowFile(Protocol):
    path: Path

    def __contains__(self, name: str) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, names: Collection[str]) -> Iterator[FileRow]:
        """The rows with these ids, if the file has them, in the file's order."""
        ...


def open_rows(path: Path) -> RowFile:
    """Indexes a .parquet file, or any other file as JSONL.

    Raises UserError if the file cannot be read, or if a row has no id or the same id as another row.
    """
    return _Parquet(path) if path.suffix == ".parquet" else _Jsonl(path)


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # id -> offset in bytes, line
        with path.open("rb") as file:
            offset = 0
            for line, content in enumerate(file, 1):
                if content.strip():
                    place = f"{path}:{line}"
                    _add(self._places, _id(content, place), (offset, line), place)
                offset += len(content)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, names: Collection[str]) -> Iterator[FileRow]:
        places = sorted((self._places[name], name) for name in names if name in self._places)
        with self.path.open("rb") as file:
            for (offset, line), name in places:
                file.seek(offset)
                place = f"{self.path}:{line}"
                yield FileRow(name, place, parse_row(file.readline(), place))


class _Parquet:
    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UserError(f"{path}: pyarrow is needed to read Parquet. Run pip install pyarrow.") from error
        # ValueError includes UnicodeDecodeError: bytes that are not text. KeyError: a key twice in one map.
        # StopIteration: fewer rows than the file says. The others: values that Python cannot represent.
        self.path, self._faults = (
            path,
            (ArrowException, OSError, ValueError, KeyError, OverflowError, StopIteration),
        )
        try:
            # Without pre_buffer=False a whole row group would be in
            # memory. pyarrow writes a million rows into one group.
            self._file = ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
        except self._faults as error:
            raise UserError(
                f"{path}: cannot be read as Parquet ({brief(str(error))}). Write the file again."
            ) from error
        if "id" not in self._file.schema_arrow.names:
            raise UserError(
                f"{path}: there is no column id, only {', '.join(self._file.schema_arrow.names)}. Add the "
                "column id."
            )
        self._places: dict[str, int] = {}  # id -> row
        for number, name in enumerate(self._ids()):
            _add(self._places, name, number, self._place(number))
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._group_ends = np.cumsum(groups)
        # The current batch begins with row `_first` of the file, and is in row group `_group`.
        self._group, self._first = -1, 0
        self._batch: Any  # a RecordBatch

    def _ids(self) -> Iterator[Any]:
        try:
            for batch in self._file.iter_batches(columns=["id"]):
                yield from batch.column(0).to_pylist()
        except self._faults as error:
            raise UserError(
                f"{self.path}: the column id cannot be read ({brief(str(error))}). Write the file again."
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, names: Collection[str]) -> Iterator[FileRow]:
        for number, name in sorted((self._places[name], name) for name in names if name in self._places):
            try:
                content = self._row(number)
            except self._faults as error:
                raise UserError(
                    f"{self._place(number)}: cannot be read ({brief(str(error))}). Write the file again."
                ) from error
            yield FileRow(name, self._place(number), content)

    def _row(self, number: int) -> dict[str, Any]:
        """Reads forward to this row.

        Only for an earlier row, the row group (perhaps the whole file) is read again.
        """
        group = int(np.searchsorted(self._group_ends, number, side="right"))
        if group != self._group or number < self._first:
            self._group, self._first = group, int(self._group_ends[group - 1]) if group else 0
            self._batches = self._file.iter_batches(batch_size=_BATCH, row_groups=[group])
            self._batch = next(self._batches)
        while number >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches)
        return self._batch.slice(number - self._first, 1).to_pylist(maps_as_pydicts="strict")[0]

    def _place(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"


def _add(places: dict[str, Any], name: Any, place: Any, where: str) -> None:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UserError(
            f"{where}: id is {quoted(name)}, but a row needs the id of its example. Write that id."
        )
    if str(name) in places:
        raise UserError(
            f"{where}: id {quoted(str(name))} is in an earlier row too, but every example has one row. "
            "Remove one of the two rows."
        )
    places[str(name)] = place


def _id(line: bytes, place: str) -> Any:
    leading = _LEADING_ID.match(line)
    if leading:
        with suppress(ValueError):
            return json.loads(leading[1])
    return parse_row(line, place).get("id")
