"""Single files: hashes, JSON, JSON lines, and writes that leave either the old file or the whole new one."""

import fcntl
import hashlib
import json
import os
import secrets
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError

_SEAL = "sha256"  # key of a record's own hash


def sha256_of_parts(*parts: bytes | str) -> str:
    """The hash of the parts with their lengths. A text counts as its UTF-8."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(data)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    return sha256_of_parts(json.dumps(value, sort_keys=True, ensure_ascii=False))


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Brings the content of a file, or the names of a directory, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_then_rename(path: Path, *, once: bool = False) -> Iterator[Path]:
    """Yields an empty temporary file beside `path` and renames it to `path` at the end.

    once: a file that is there by then stays instead. On an error the temporary file is removed. Raises
    UserError for an error of the operating system: no permission, a file in a directory's place, a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(temporary):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if once:
                with suppress(FileExistsError):
                    os.link(temporary, path)
            else:
                temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _locked(temporary: Path) -> Iterator[None]:
    """Creates a temporary file and holds its lock.

    The lock tells remove_abandoned that a process still writes the file.
    """
    while True:
        with temporary.open("wb") as mark:
            # On a file system without locks, the temporary files of killed processes stay.
            with suppress(OSError):
                fcntl.flock(mark, fcntl.LOCK_EX)
            # remove_abandoned of another process may have removed the file before it was locked: then create
            # it again.
            if temporary.exists() and os.path.samestat(temporary.stat(), os.fstat(mark.fileno())):
                yield
                return


def remove_abandoned(directory: Path) -> None:
    """Removes temporary files that killed processes left in a directory.

    A writer holds the lock of its file, and the system releases the lock when the process ends, however it
    ends. If the lock can be taken, the file is orphaned and safe to delete, also if another machine wrote it.
    """
    for leftover in directory.glob(".*.tmp"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def write_json(path: Path, value: Any, *, once: bool = False) -> None:
    with temporary_then_rename(path, once=once) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with temporary_then_rename(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_sealed(path: Path, content: dict[str, Any], *, once: bool = False) -> None:
    """Writes a JSON object with the sha256 of its content under the key "sha256".

    read_sealed then notices any damage. once: see temporary_then_rename.
    """
    write_json(path, {**content, _SEAL: sha256_of_json(content)}, once=once)


def read_sealed(path: Path) -> dict[str, Any]:
    """The content that write_sealed wrote, without the key "sha256".

    An object of an older version, without it, is accepted. Raises UserError if the file is missing, is no
    JSON object, or if its content has another sha256 than it states.
    """
    content = read_json(path)
    seal = content.pop(_SEAL, None)
    try:
        actual = sha256_of_json(content)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}: it holds half a surrogate pair. Restore the file, or remove it and run the stage again."
        ) from error
    if seal is not None and seal != actual:
        raise UserError(
            f"{path}: the content does not have the sha256 that the file states. Restore the file, or remove "
            "it and run the stage again."
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing, or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of an object")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}). Restore the file. If a stage made it, you can also remove it "
            "and run the stage again."
        ) from error
    return content


def parse_row(line: bytes, place: str) -> dict[str, Any]:
    """One line of JSONL as a row. place: file and line, for the error.

    Raises UserError if it is no JSON object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: not valid JSON ({error}). A row must be a JSON object on one line."
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object on one line, not a {type(row).__name__}")
    return row


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of every non-empty line. The file may begin with a byte order mark.

    Raises UserError, naming file and line, for a malformed line.
    """
    with path.open("rb") as file:
        yield from jsonl_rows(file, path)


def jsonl_rows(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """read_jsonl for lines that the caller has opened. path: their file, for errors."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if line.strip():
            yield number, parse_row(line, f"{path}:{number}")
