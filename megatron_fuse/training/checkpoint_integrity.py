"""Checks that a checkpoint's files are those that were written: sizes and checksums, compared at every load.

    iter_0000120/checksums.json    files: {"facts.json": {"bytes": 4399, "xxh3_128": "..."}, ...}, of the
                                   small files
                                   items: {"__0_0.distcp": {"bytes": 667222, "items": [[0, "..."], [1261,
                                   "..."], ...]}, ...}: of the large ones the checksum of each stored item,
                                   which ends where the next begins

The process that writes an item computes its checksum while it writes. A load reads an item into memory once,
compares it there, and makes the tensor from the same bytes. Small files are read the same way. Items that the
load does not need, such as the optimizer's in an export, are compared in background threads, divided among
the ranks. So every load checks the whole checkpoint.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_fuse.errors import UserError
from megatron_fuse.storage import write_json
from megatron_fuse.storage.checksums import (
    FileRecord,
    parse_records,
    record_of_content,
    record_of_file,
    records_as_json,
    wrong_content,
)

CHECKSUMS = "checksums.json"
LARGE = ".distcp"  # suffix of the files that the ranks write
_THREADS = 2  # for the items that the load does not need
# Bytes that stay in a core's cache between the read and the hash, which both release the GIL.
_BLOCK = 1 << 19
_FIX = "Name another checkpoint, or restore this one from a copy."


@dataclass(frozen=True)
class StoredItems:
    """A large file. bytes: its size. items: for each stored item the offset where it begins, ascending from
    0, and its checksum."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(ge=0, strict=True)]
    items: list[
        tuple[Annotated[int, Field(ge=0, strict=True)], Annotated[str, Field(pattern="^[0-9a-f]{32}$")]]
    ]

    def spans(self) -> dict[int, tuple[int, str]]:
        """Offset of each item -> its length and checksum."""
        ends = [start for start, _ in self.items[1:]] + [self.bytes]
        return {
            start: (end - start, checksum) for (start, checksum), end in zip(self.items, ends, strict=True)
        }


def write_checksums(directory: Path, written: Mapping[str, StoredItems]) -> None:
    """Writes checksums.json, the last file of a checkpoint.

    written: the writers' checksums of the large files. The small files, which rank 0 wrote, are read again.
    Raises UserError if the size of a large file is not the one that its writer counted.
    """
    names = {path.name for path in directory.iterdir()} - {CHECKSUMS}
    large = {name for name in names if name.endswith(LARGE)}
    if unknown := large ^ set(written):
        raise ValueError(f"{min(unknown)} has no file or no checksums")
    for name, record in written.items():
        if (size := (directory / name).stat().st_size) != record.bytes:
            raise UserError(
                f"{directory / name}: the file has {size} bytes, but {record.bytes} were written. The file "
                "system lost data."
            )
    small = {name: record_of_file(directory / name) for name in sorted(names - large)}
    items = {name: asdict(written[name]) for name in sorted(written)}
    write_json(directory / CHECKSUMS, {"files": records_as_json(small), "items": items})


class CheckpointFiles:
    """The files of one checkpoint during a load, on one rank.

    verify: compare checksums. If checksums.json exists, presence and sizes are compared in any case. Raises
    UserError, which names the file, if checksums.json is missing (with verify) or damaged, or if a file
    differs from it.
    """

    def __init__(self, path: Path, *, verify: bool) -> None:
        self.path, self.verify = path, verify
        self.small: dict[str, FileRecord] | None = None
        self.large: dict[str, StoredItems] = {}
        place = path / CHECKSUMS
        if place.exists():
            self.small, self.large = _read_checksums(place)
        elif verify:
            raise UserError(
                f"{path} has no {CHECKSUMS}. An older version wrote it, or it is incomplete, so damage would "
                "not be found. Name another checkpoint, or accept this risk with --no-verify."
            )
        self._spans: dict[str, dict[int, tuple[int, str]]] = {}
        self._compare_rest: Callable[[set[tuple[str, int]]], None] = lambda _: None

    def content(self, name: str) -> bytes:
        """The bytes of a small file. Raises UserError if they differ from checksums.json."""
        place = self.path / name
        try:
            content = place.read_bytes()
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error.strerror}). {_FIX}") from error
        if self.small is not None:
            if name not in self.small:
                raise self._not_listed(name)
            actual, record = record_of_content(content), self.small[name]
            if (actual.bytes != record.bytes or self.verify) and (wrong := wrong_content(actual, record)):
                raise self._damaged(name, wrong)
        return content

    def check_place(self, name: str, offset: int, length: int) -> None:
        """Raises UserError unless an item is stored where .metadata places one,
        in a file of the checkpoint itself."""
        if self.small is None:
            if Path(name).name != name or not (self.path / name).is_file():
                raise UserError(
                    f"{self.path / name[:100]}: the file is missing, but .metadata places tensors there. "
                    f"{_FIX}"
                )
        elif name not in self.large:
            raise self._not_listed(name)
        elif self._span(name, offset)[0] != length:
            raise self._damaged(
                name,
                f".metadata places an item of {length} bytes at {offset}, but no such item is stored there",
            )

    def compare_sizes(self, rank: int, world_size: int) -> None:
        """Compares presence and size of a rank's share of the large files.

        Raises UserError if one differs.
        """
        for name in self._share(rank, world_size):
            path, size = self.path / name, self.large[name].bytes
            if not path.is_file():
                raise self._damaged(name, "missing")
            if (actual := path.stat().st_size) != size:
                raise self._damaged(name, f"{actual} bytes instead of {size}")

    def read_item(self, file: BinaryIO, name: str, offset: int, into: memoryview) -> None:
        """Reads the whole item at `offset` of a large file and compares it. file: opened unbuffered."""
        self._read(file, name, offset, len(into), lambda at: into[at : at + _BLOCK])

    def _read(
        self, file: BinaryIO, name: str, offset: int, length: int, block_at: Callable[[int], memoryview]
    ) -> None:
        """As read_item. block_at(n): the memory that takes the item's bytes from byte n on."""
        digest = xxhash.xxh3_128() if self.verify and self.small is not None else None
        file.seek(offset)
        read = 0
        while read < length:
            block = block_at(read)[: length - read]
            count = file.readinto(block)  # type: ignore[attr-defined]
            if not count:
                raise self._damaged(name, f"the file ends at byte {offset + read}, within an item")
            if digest is not None:
                digest.update(block[:count])
            read += count
        if digest is not None and (actual := digest.hexdigest()) != (expected := self._span(name, offset)[1]):
            raise self._damaged(
                name, f"checksum {actual[:12]}... instead of {expected[:12]}... at byte {offset}"
            )

    @contextmanager
    def comparing_rest(self, rank: int, world_size: int) -> Iterator[None]:
        """Within the block, compare_all_but compares this rank's share of the other items in threads. Damage
        is raised at its end.

        If the block itself fails because of a damaged file, the error names that file.
        """
        pool, comparisons = ThreadPoolExecutor(_THREADS), list[Future[None]]()

        def compare(read: set[tuple[str, int]]) -> None:
            for name in self._share(rank, world_size) if self.verify else ():
                rest = [offset for offset, _ in self.large[name].items if (name, offset) not in read]
                comparisons.append(pool.submit(self._compare_items, name, rest))

        self._compare_rest = compare
        failure: Exception | None = None
        try:
            try:
                yield
            except UserError:
                raise
            except Exception as error:
                failure = error
            for comparison in comparisons:
                if damage := comparison.exception():
                    raise damage from failure
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(cancel_futures=True)

    def compare_all_but(self, read: set[tuple[str, int]]) -> None:
        """Starts the comparison of all items but those that this rank reads itself.
        read: their (file, offset)."""
        self._compare_rest(read)

    def _compare_items(self, name: str, offsets: list[int]) -> None:
        block = memoryview(bytearray(_BLOCK))
        try:
            with (self.path / name).open("rb", buffering=0) as file:
                for offset in offsets:
                    self._read(file, name, offset, self._span(name, offset)[0], lambda _: block)
        except OSError as error:
            raise self._damaged(name, f"cannot be read ({error.strerror})") from error

    def _span(self, name: str, offset: int) -> tuple[int, str]:
        spans = self._spans.get(name) or self._spans.setdefault(name, self.large[name].spans())
        if offset not in spans:
            raise self._damaged(name, f".metadata places an item at byte {offset}, but none begins there")
        return spans[offset]

    def _share(self, rank: int, world_size: int) -> list[str]:
        """A rank's part of the large files. At an unchanged layout these are the files that it wrote, and
        mostly those that it loads."""
        return [
            name for index, name in enumerate(sorted(self.large)) if _writer(name, index) % world_size == rank
        ]

    def _damaged(self, name: str, wrong: str) -> UserError:
        return UserError(
            f"{self.path / name}: {wrong}. The file is damaged or belongs to another checkpoint. {_FIX}"
        )

    def _not_listed(self, name: str) -> UserError:
        return UserError(
            f"{self.path / CHECKSUMS} does not list {name[:100]}. One of the two is damaged. {_FIX}"
        )


def _read_checksums(place: Path) -> tuple[dict[str, FileRecord], dict[str, StoredItems]]:
    try:
        content = json.loads(place.read_bytes())
        files, items = content["files"], content["items"]
        large = TypeAdapter(dict[str, StoredItems]).validate_python(items)
        for name, record in large.items():
            starts = [start for start, _ in record.items]
            if starts != sorted({0, *starts}) or starts[-1:] >= [record.bytes] or Path(name).name != name:
                raise ValueError(f"items of {name[:100]!r}")
    except ValidationError as error:
        first = error.errors()[0]
        what = f"items: {'.'.join(map(str, first['loc']))[:100]}: {first['msg']}"
        raise UserError(f"{place}: damaged ({what}). {_FIX}") from error
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{place}: damaged ({type(error).__name__}: {str(error)[:100]}). {_FIX}") from error
    return parse_records(files, f"{place}: files"), large


def _writer(name: str, otherwise: int) -> int:
    """The rank in a name such as __3_1.distcp, or `otherwise` if the name has none."""
    rank = name.removeprefix("__").partition("_")[0]
    return int(rank) if rank.isascii() and rank.isdigit() else otherwise
