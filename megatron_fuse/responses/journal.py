"""Writes each reply of a server to disk as it arrives.

So an interrupted shard does not send the same request again.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from megatron_fuse.errors import UserError
from megatron_fuse.sources.completions import Reply
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.storage.appending import open_for_appending, whole_lines
from megatron_fuse.storage.records import first_problem


@dataclass(frozen=True, kw_only=True)
class _Entry(Reply):
    request: str
    sha256: str


_ENTRIES = TypeAdapter(_Entry)


class Journal:
    """JSON lines {request, the fields of a Reply, and a sha256 of these}.

    `request` is a hash of the whole request, so a changed request does not find the old reply.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._replies: dict[str, Reply] = {}
        for number, line in enumerate(whole_lines(file), 1):
            try:
                self._read(line)
            except ValidationError as error:
                raise _damaged(path, number, first_problem(error)) from error
            except ValueError as error:
                raise _damaged(path, number, str(error)) from error

    def _read(self, line: bytes) -> None:
        """Raises ValueError (ValidationError is one) if the line is damaged."""
        entry = _ENTRIES.validate_json(line, strict=True)
        reply = Reply(**{field.name: getattr(entry, field.name) for field in fields(Reply)})
        if _row(entry.request, reply) != asdict(entry):
            raise ValueError("it does not have the sha256 that it states")
        self._replies[entry.request] = reply

    def read_beside(self, path: Path) -> None:
        """Takes over the replies in the journal of another process.

        It may still write: a line that is not whole is passed over.
        """
        content = b""
        with suppress(OSError):  # removed by now
            content = path.read_bytes()
        for line in content.split(b"\n"):
            with suppress(ValueError):
                self._read(line)

    def __contains__(self, request: str) -> bool:
        return request in self._replies

    def reply(self, request: str) -> Reply:
        return self._replies[request]

    def add(self, request: str, reply: Reply) -> None:
        self._replies[request] = reply
        self._file.write(json.dumps(_row(request, reply), ensure_ascii=False).encode() + b"\n")
        self._file.flush()


def _row(request: str, reply: Reply) -> dict[str, object]:
    content = {"request": request, **asdict(reply)}
    return {**content, "sha256": sha256_of_json(content)}


def _damaged(path: Path, line: int, why: str) -> UserError:
    return UserError(
        f"{path}:{line}: damaged ({why}). Remove the file; its answers are then requested again."
    )


@contextmanager
def open_journal(path: Path, beside: Iterable[Path] = ()) -> Iterator[Journal]:
    """Opens a new or an existing journal for this process alone.

    beside: journals of other processes for the same requests, whose replies it takes over.

    Its name is that of a temporary file (`.*.tmp`). It stays until the artifact is complete: at the end, a
    stage removes the temporary files that no process has locked.
    Raises UserError if another process has it open, or if it is damaged.
    """
    with open_for_appending(path, "requests the same answers") as file:
        journal = Journal(file, path)
        for other in beside:
            if other != path:
                journal.read_beside(other)
        yield journal
