"""A file to which finished pieces of work are appended, each as one JSON line. It makes work resumable.

The first line is {"made_from": ...}: everything that decides the other lines. A line that was being written
when the process was killed is dropped.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.results import refuse_other
from megatron_fuse.storage import parse_row
from megatron_fuse.storage.appending import open_for_appending, whole_lines
from megatron_fuse.storage.records import first_problem

Row = TypeVar("Row")
_FIX = "Remove the file; what it held is then made again."


class Records(Generic[Row]):
    """The rows of an open file, in the order in which they were added. Row: a dataclass."""

    def __init__(self, file: BinaryIO, path: Path, kind: type[Row], made_from: Mapping[str, Any]) -> None:
        self._file = file
        lines = whole_lines(file)
        if lines:
            header = parse_row(lines[0], f"{path}:1").get("made_from")
            if not isinstance(header, dict):
                raise UserError(f"{path}:1: made_from: missing. {_FIX}")
            refuse_other(path, header, made_from)
        else:
            self._write({"made_from": made_from})
        adapter = TypeAdapter(kind)
        self.rows: list[Row] = []
        for number, line in enumerate(lines[1:], 2):
            try:
                self.rows.append(adapter.validate_json(line, strict=True))
            except ValidationError as error:
                raise UserError(f"{path}:{number}: damaged ({first_problem(error)}). {_FIX}") from error

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(asdict(row))  # type: ignore[call-overload]  # mypy cannot bind Row to dataclasses

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


@contextmanager
def open_records(path: Path, kind: type[Row], made_from: Mapping[str, Any]) -> Iterator[Records[Row]]:
    """Opens a new or an existing file for this process alone.

    Raises UserError if another process has it open, if it is damaged, or if it was made from other inputs.
    """
    with open_for_appending(path, "writes to this file") as file:
        yield Records(file, path, kind, made_from)
