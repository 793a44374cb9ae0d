"""Whether a checkpoint's files are those that were written: sizes and checksums, compared at every load.

    iter_0000120/checksums.json    {"files": {"__0_0.distcp": {"bytes": 667222, "xxh3_128": "..."}, ...}}: all other files

The process that writes a large file computes its checksum on the way. At a load every rank compares its share of the large files
in threads, while Megatron reads them; what was loaded is used only once all ranks have found all files right. Small files are read
once, compared, and parsed from the very bytes that were compared.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.storage import write_json
from megatron_fuse.storage.checksums import (
    FileRecord,
    difference,
    parse_records,
    record_of_content,
    record_of_file,
    records_as_json,
    wrong_content,
)

CHECKSUMS = "checksums.json"
LARGE = ".distcp"  # suffix of the files that the ranks write
_THREADS = 2  # Megatron writes two files per rank
_FIX = "name another checkpoint, or restore this one from a copy"


def write_checksums(directory: Path, written: Mapping[str, FileRecord]) -> None:
    """Records the files of a checkpoint that is complete but for this one.

    written: of each large file what its writer computed. The small ones, of rank 0, are read again. Raises UserError where a large
    file has not the size that its writer counted.
    """
    names = sorted(path.name for path in directory.iterdir() if path.name != CHECKSUMS)
    if unknown := [name for name in names if name.endswith(LARGE) and name not in written]:
        raise ValueError(f"no writer gave a checksum of {unknown[0]}")
    for name, record in written.items():
        if wrong := difference(directory / name, record, content=False):
            raise UserError(f"{directory / name}: {wrong} after it was written: the file system lost data")
    records = {name: written.get(name) or record_of_file(directory / name) for name in names}
    write_json(directory / CHECKSUMS, {"files": records_as_json(records)})


class CheckpointFiles:
    """The files of one checkpoint during a load.

    verify: compare checksums; presence and sizes are compared in any case where checksums.json is there. Raises UserError, naming the
    file, where it is not there, damaged, or says that another file is.
    """

    def __init__(self, path: Path, *, verify: bool) -> None:
        self.path, self.verify = path, verify
        self.records: dict[str, FileRecord] | None = None
        place = path / CHECKSUMS
        if place.exists():
            self.records = parse_records(_files_of(place), f"{place}: files")
        elif verify:
            raise UserError(
                f"{path} has no {CHECKSUMS}: it was written by an older version or is incomplete, and damage would go unnoticed: "
                "name another checkpoint, or accept the risk with --no-verify"
            )

    def content(self, name: str) -> bytes:
        """The bytes of a small file, after comparing them."""
        place = self.path / name
        record = self.record(name)
        try:
            content = place.read_bytes()
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error.strerror}): {_FIX}") from error
        found = record_of_content(content)
        if record and (found.bytes != record.bytes or self.verify):
            self._refuse(name, wrong_content(found, record))
        return content

    def record(self, name: str) -> FileRecord | None:
        """None where the checkpoint has no checksums. Raises UserError for a file that it does not list."""
        if self.records is None:
            return None
        if name not in self.records:
            raise UserError(f"{self.path / CHECKSUMS} does not list {name[:100]}: one of the two is damaged: {_FIX}")
        return self.records[name]

    def compare_sizes(self, rank: int, world_size: int) -> None:
        """Presence and size of a rank's share of the large files."""
        for name in self._share(rank, world_size):
            self._refuse(name, difference(self.path / name, self.records[name], content=False))  # type: ignore[index]

    @contextmanager
    def compared_beside(self, rank: int, world_size: int) -> Iterator[None]:
        """Compares the checksums of a rank's share of the large files while the block runs, and raises at its end.

        A block that fails over a damaged file fails with that file's name.
        """
        names = self._share(rank, world_size) if self.verify else []
        pool = ThreadPoolExecutor(_THREADS)
        try:
            comparisons = {name: pool.submit(difference, self.path / name, self.records[name]) for name in names}  # type: ignore[index]
            failure: Exception | None = None
            try:
                yield
            except Exception as error:
                failure = error
            for name, comparison in comparisons.items():
                self._refuse(name, comparison.result(), failure)
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(cancel_futures=True)

    def _share(self, rank: int, world_size: int) -> list[str]:
        """A rank's part of the large files: at an unchanged layout those that it wrote, and mostly those that it loads."""
        large = sorted(name for name in self.records or () if name.endswith(LARGE))
        return [name for index, name in enumerate(large) if _writer(name, index) % world_size == rank]

    def _refuse(self, name: str, wrong: str | None, cause: BaseException | None = None) -> None:
        if wrong:
            raise UserError(f"{self.path / name}: {wrong}: damaged, or a file of another checkpoint: {_FIX}") from cause


def _files_of(place: Path) -> object:
    try:
        return json.loads(place.read_bytes())["files"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{place}: damaged ({type(error).__name__}: {str(error)[:100]}): {_FIX}") from error


def _writer(name: str, otherwise: int) -> int:
    """The rank in a name such as __3_1.distcp."""
    rank = name.removeprefix("__").partition("_")[0]
    return int(rank) if rank.isascii() and rank.isdigit() else otherwise
