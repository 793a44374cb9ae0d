"""Directories that a command makes as a whole, such as an exported model, with a record of their files.

    PARENT/NAME/RECORD           JSON: what the directory was made from, and size and checksum of every other file
    PARENT/.NAME.lock            while a process makes or replaces NAME
    PARENT/.NAME.1a2b3c4d.new    what is being written
    PARENT/.NAME.1a2b3c4d.old    what is being replaced; after a kill it gets its name back unless the new one has it

A file that the command did not write, or that was changed since, is never removed.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
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
from megatron_fuse.text_safety import say


@dataclass(frozen=True)
class Found:
    """A directory with a record. origin: what it was made from; the others: paths of its files."""

    directory: Path
    record: str
    origin: dict[str, Any]
    recorded: list[str]
    missing: list[str]
    changed: dict[str, str]  # and how
    foreign: list[str]  # not in the record

    @property
    def whole(self) -> bool:
        return not self.missing and not self.changed

    def refuse_changes(self, option: str) -> None:
        """Raises UserError if the directory may not be replaced. option: what names another directory, for the message."""
        if self.changed:
            name, how = next(iter(self.changed.items()))
            raise UserError(
                f"{self.directory / name}: {how}: it was changed or damaged after it was written: move it away or remove it to have "
                f"it made again, or choose another {option}"
            )
        if self.foreign:
            raise UserError(
                f"{self.directory} is to be replaced, but holds what {self.record} does not list: {first_few(self.foreign)}: move "
                f"that to another place, or choose another {option}"
            )


def find(directory: Path, record: str, option: str, *, verify: bool = True) -> Found | None:
    """The directory and the state of its files, None where there is none. verify: compare checksums, not sizes alone.

    Raises UserError, naming the option that chose the directory, for something that no command of ours has made.
    """
    if not os.path.lexists(directory):
        return None
    if not (directory / record).is_file():
        raise UserError(f"{option}: {directory} exists and holds no {record}: move it, or choose another directory")
    content = read_sealed(directory / record)
    if "files" not in content:
        raise UserError(
            f"{directory / record} does not list the directory's files, as it was written by an older version: move "
            f"{directory}, or choose another {option}"
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
def sole_writer(directory: Path, record: str, progress: Callable[[str], None] = say) -> Iterator[None]:
    """Within the block no other process makes this directory; it waits for one that does. Sweeps what killed ones left."""
    with LockFile(directory.with_name(f".{directory.name}.lock")) as lock:
        lock.lock(1, lambda owner: progress(f"{directory}: {owner} is writing it, waiting for its end"))
        with refusals_of(directory):
            _sweep(directory, record)
        yield


@contextmanager
def directory_then_rename(directory: Path, replaced: Found | None = None) -> Iterator[Path]:
    """Yields an empty directory beside `directory` and gives it that name at the end; on an error nothing is left behind.

    replaced: what has the name now; it keeps it until the new one is whole. Only for a sole writer. Raises UserError where the
    operating system refuses.
    """
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
    """Writes the record of a directory that is complete but for it. Reads every file."""
    write_sealed(directory / record, {**origin, "files": records_as_json(records_of_files(directory))})


@contextmanager
def refusals_of(directory: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns what the operating system refuses in the block into a UserError that names the directory."""
    try:
        yield
    except UserError as error:
        if temporary is None or not isinstance(error.__cause__, OSError):
            raise
        raise UserError(str(error).replace(str(temporary), str(directory)) + _room(directory)) from error
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error}){_room(directory)}") from error


def _room(directory: Path) -> str:
    with suppress(OSError, StopIteration):
        place = next(path for path in directory.absolute().parents if path.exists())
        return f"; {shutil.disk_usage(place).free / 1e6:.0f} MB are free there"
    return ""


def _sweep(directory: Path, record: str) -> None:
    """What killed writers left. Nobody else may be writing."""
    name = re.compile(rf"\.{re.escape(directory.name)}\.[0-9a-f]{{8}}\.(new|old)")
    for path in sorted(directory.parent.iterdir()):
        if not (found := name.fullmatch(path.name)):
            continue
        if found[1] == "new":
            shutil.rmtree(path, ignore_errors=True)
        elif not os.path.lexists(directory):
            path.rename(directory)
        else:
            with suppress(UserError):  # a record that is damaged says nothing of the files beside it: they stay
                listed = read_sealed(path / record).get("files") if (path / record).is_file() else {}
                _remove_files(path, list(parse_records(listed, record)), record)


def _remove_files(directory: Path, recorded: list[str], record: str) -> None:
    """Removes recorded files, the record last, and the directories that are empty then."""
    for name in [*recorded, record]:
        with suppress(OSError):
            (directory / name).unlink()
    for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        directory.rmdir()


def _flush_all(directory: Path) -> None:
    """Brings a directory to disk, so that a name never outlives a power failure that its content did not."""
    for path in [*(directory / name for name in files_below(directory)), directory]:
        flush_to_disk(path)
