"""Checksums of files: XXH3 with 128 bits.

It finds damage at the speed of memory, but does not protect against forgery. A record is written as {"bytes":
667222, "xxh3_128": "32 hexadecimal digits"}; `xxhsum -H128 FILE` prints the same digits.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_fuse.errors import UserError

# Bytes. A block stays in the cache of a core between the read and the hash. Both release the GIL.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(ge=0, strict=True)]
    xxh3_128: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def record_of_content(content: bytes) -> FileRecord:
    return FileRecord(len(content), xxhash.xxh3_128(content).hexdigest())


def record_of_file(path: Path) -> FileRecord:
    """The record of a file, which is read once, block by block. Raises OSError if it cannot be read."""
    digest, block, size = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK)), 0
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            digest.update(block[:read])
            size += read
    return FileRecord(size, digest.hexdigest())


def records_of_files(directory: Path) -> dict[str, FileRecord]:
    """A record of every file below a directory, by its path relative to the directory. Raises OSError."""
    return {name: record_of_file(directory / name) for name in files_below(directory)}


def files_below(directory: Path) -> list[str]:
    """Sorted paths, relative to a directory, of everything below it that is not a directory.

    Links are not followed.
    """
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def records_as_json(records: dict[str, FileRecord]) -> dict[str, Any]:
    return {name: asdict(record) for name, record in records.items()}


def parse_records(value: Any, place: str) -> dict[str, FileRecord]:
    """The inverse of records_as_json. place: file and key, for the error.

    Raises UserError for any other content.
    """
    try:
        records = TypeAdapter(dict[str, FileRecord]).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:100]
        raise UserError(
            f"{place}: {f'{key}: ' if key else ''}{first['msg']}. The file is damaged, or another program "
            "wrote it."
        ) from error
    for name in records:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or "\0" in name:
            raise UserError(
                f"{place}: {name[:100]!r} is not a file of this directory. The file is damaged, or another "
                "program wrote it."
            )
    return records


def difference(path: Path, record: FileRecord, *, content: bool = True) -> str | None:
    """What is wrong with a file, None if nothing is.

    content: compare the checksum as well, not only the size.
    """
    if not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != record.bytes:
        return f"{size} bytes instead of {record.bytes}"
    return wrong_content(record_of_file(path), record) if content else None


def wrong_content(actual: FileRecord, record: FileRecord) -> str | None:
    """How a file that was read differs from its record, None if it does not. actual: what was read."""
    if actual.bytes != record.bytes:
        return f"{actual.bytes} bytes instead of {record.bytes}"
    if actual != record:
        return f"checksum {actual.xxh3_128[:12]}... instead of {record.xxh3_128[:12]}..."
    return None


def first_few(names: Iterable[str], most: int = 3) -> str:
    """Names for a message: the first few, and how many more there are."""
    first = list(names)
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return ", ".join(first[:most]) + more
