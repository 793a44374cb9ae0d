"""Directories that a command writes as a whole, such as an exported model, with a record of their files.

    PARENT/NAME/RECORD           JSON: what the directory was made from, and size and checksum of every other
                                 file
    PARENT/.NAME.lock            exists while a process makes or replaces NAME
    PARENT/.NAME.1a2b3c4d.new    the directory that is being written
    PARENT/.NAME.1a2b3c4d.old    the directory that is replaced; renamed back after a kill if NAME is missing

The command never removes a file that it did not write, or that was changed since.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.storage.checksums import (
    difference,
    files_below,
    first_few,
    parse_records,
    records_as_json,
    records_of_files,
)
from megatron_fuse.storage.files import flush_to_disk, read_sealed, write_sealed
from megatron_fuse.storage.locks import LockFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A directory with a record. record: the name of the record's file.

    origin: what the directory was made from.

    recorded, missing, changed, foreign: paths of files, relative to the directory.
    """

    directory: Path
    record: str
    origin: dict[str, Any]
    recorded: list[str]
    missing: list[str]
    changed: dict[str, str]  # path -> what differs
    foreign: list[str]  # not in the record

    @property
    def whole(self) -> bool:
        return not self.missing and not self.changed

    def refuse_changes(self, option: str) -> None:
        """Raises UserError if files were changed, or if there are files that the record does not list.

        option: the option that names another directory, for the message.
        """
        if self.changed:
            name, how = next(iter(self.changed.items()))
            raise UserError(
                f"{self.directory / name}: {how}. The file was changed or damaged after it was written. Move "
                f"or remove it and run this again, or choose another {option}."
            )
        if self.foreign:
            raise UserError(
                f"{self.directory} must be replaced, but it holds files that {self.record} does not list: "
                f"{first_few(self.foreign)}. Move these files to another place, or choose another {option}."
            )


def find(directory: Path, record: str, option: str, *, verify: bool = True) -> Found | None:
    """The directory and the state of its files, None if it does not exist.

    verify: compare checksums, not sizes alone. Raises UserError, naming the option that chose the directory,
    if the directory has no record of its files.
    """
    if not os.path.lexists(directory):
        return None
    if not (directory / record).is_file():
        raise UserError(
            f"{option}: {directory} exists but has no {record}. Move it, or choose another directory."
        )
    content = read_sealed(directory / record)
    if "files" not in content:
        raise UserError(
            f"{directory / record} does not list the files of the directory, because an older version wrote "
            f"it. Move {directory}, or choose another {option}."
        )
    records = parse_records(content.pop("files"), f"{directory / record}: files")
    wrong = {name: difference(directory / name, one, content=verify) for name, one in records.items()}
    return Found(
        directory=directory,
        record=record,
        origin=content,
        recorded=list(records),
        missing=[name for name, how in wrong.items() if how == "missing"],
        changed={name: how for name, how in wrong.items() if how not in (None, "missing")},
        foreign=[name for name in files_below(directory) if name not in records and name != record],
    )


@contextmanager
def sole_writer(directory: Path, record: str) -> Iterator[None]:
    """Within the block no other process writes this directory.

    If another process writes it, this waits for its end. First removes what killed processes left. Raises
    UserError for an error of the operating system.
    """
    with LockFile(directory.with_name(f".{directory.name}.lock")) as lock:
        lock.lock(1, lambda owner: logger.info(f"{directory}: {owner} is writing it, waiting for its end"))
        with refusals_of(directory):
            _sweep(directory, record)
        yield


@contextmanager
def directory_then_rename(directory: Path, replaced: Found | None = None) -> Iterator[Path]:
    """Yields an empty directory beside `directory` and renames it to `directory` at the end.

    On an error it is removed.

    replaced: the directory that has the name now. It keeps the name until the new one is whole. Call this
    only within sole_writer. Raises UserError for an error of the operating system.
    """
    # Two renames: Linux cannot rename a directory over one that holds files. A kill between them leaves only
    # the .old directory, to which _sweep gives its name back.
    mark = secrets.token_hex(4)
    temporary, old = (directory.with_name(f".{directory.name}.{mark}.{end}") for end in ("new", "old"))
    with refusals_of(directory, temporary):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _flush_all(temporary)
            if replaced is not None:
                directory.rename(old)
            try:
                temporary.rename(directory)
            except OSError:
                if replaced is not None:
                    old.rename(directory)
                raise
            flush_to_disk(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if replaced is not None:
        _remove_files(old, replaced.recorded, replaced.record)


def record_files(directory: Path, record: str, origin: Mapping[str, Any]) -> None:
    """Writes the record of a directory whose other files are complete.

    Reads every file. origin: what it was made from.
    """
    write_sealed(directory / record, {**origin, "files": records_as_json(records_of_files(directory))})


@contextmanager
def refusals_of(directory: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns an OSError in the block into a UserError that names the directory and the free space.

    temporary: the directory that is being written. In the messages of errors its name is replaced by that of
    `directory`.
    """
    try:
        yield
    except UserError as error:
        if temporary is None or not isinstance(error.__cause__, OSError):
            raise
        raise UserError(str(error).replace(str(temporary), str(directory)) + _room(directory)) from error
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written ({error.strerror or error}){_room(directory)}"
        ) from error


def _room(directory: Path) -> str:
    with suppress(OSError, StopIteration):
        place = next(path for path in directory.absolute().parents if path.exists())
        return f"; {shutil.disk_usage(place).free / 1e6:.0f} MB are free there"
    return ""


def _sweep(directory: Path, record: str) -> None:
    """Cleans up after killed writers. Only for a process that holds the lock of sole_writer.

    A .new directory was never complete, and goes. An .old one gets its name back if no directory has it. Else
    the new one was complete, and of the old one only the recorded files are removed.
    """
    name = re.compile(rf"\.{re.escape(directory.name)}\.[0-9a-f]{{8}}\.(new|old)")
    for path in sorted(directory.parent.iterdir()):
        if not (leftover := name.fullmatch(path.name)):
            continue
        if leftover[1] == "new":
            shutil.rmtree(path, ignore_errors=True)
        elif not os.path.lexists(directory):
            path.rename(directory)
        else:
            # A damaged record does not say which files are the command's: all of them stay.
            with suppress(UserError):
                listed = read_sealed(path / record).get("files") if (path / record).is_file() else {}
                _remove_files(path, list(parse_records(listed, record)), record)


def _remove_files(directory: Path, recorded: list[str], record: str) -> None:
    """Removes recorded files, the record last, and the directories that are empty then."""
    # The record goes last, so that after a kill it still says which of the remaining files may be removed.
    for name in [*recorded, record]:
        with suppress(OSError):
            (directory / name).unlink()
    for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        directory.rmdir()


def _flush_all(directory: Path) -> None:
    """Flushes all files of a directory and its names to disk.

    After a power failure no name stays without its content.
    """
    for path in [*(directory / name for name in files_below(directory)), directory]:
        flush_to_disk(path)
