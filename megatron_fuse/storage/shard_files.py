"""The files of one plan while processes make it: the locks of its shards, and which shards are whole.

DIRECTORY/.shard-00000.XXXX.work/   files of a shard in work; the next owner removes them after a kill
.DIRECTORY.lock                     beside the directory: lock 1 for plan and manifest, lock 2 + i for shard i

claimed_shard_files.py has the same for processes that take shards by claim.
"""

import logging
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.storage.artifact import Artifact, Plan, completed, first_damage
from megatron_fuse.storage.claims import remove_claims
from megatron_fuse.storage.files import (
    flush_to_disk,
    remove_abandoned,
    sha256_of_file,
    sha256_of_json,
    write_sealed,
)
from megatron_fuse.storage.locks import LockFile
from megatron_fuse.storage.records import MarkerRecord, read_record

logger = logging.getLogger(__name__)

Counts = dict[str, int]

_DIRECTORY, SHARDS = 1, 2  # numbers of locks: that of plan and manifest, that of the first shard


class ShardFiles:
    """The directory of one plan, which holds plan.json.

    A context manager: at its end this process holds no lock of a shard. Raises UserError if the directory
    holds another plan, or cannot be written.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.directory, self.names = plan, plan.directory, plan.names()
        self._sha256 = sha256_of_json(plan.content())
        self._reported: set[int] = set()
        self._locks = LockFile(plan.directory.with_name(f".{plan.directory.name}.lock"))

    def __enter__(self) -> "ShardFiles":
        self._locks.__enter__()
        try:
            with self._alone():
                # Since the caller looked, another process may have begun another plan (completed raises) or
                # finished this one. A manifest that is there all the same is damaged, or describes damaged
                # files.
                if completed(self.plan) is None:
                    (self.directory / "manifest.json").unlink(missing_ok=True)
                    self._write_plan()
        except BaseException:
            self._locks.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locks.__exit__(kind, error, trace)

    def is_taken(self, index: int) -> bool:
        """Whether try_lock would surely fail. False if only trying it can tell."""
        return False

    def try_lock(self, index: int) -> bool:
        """Takes a shard, if no other process makes it. Does not wait."""
        return self._locks.try_lock(SHARDS + index)

    def unlock(self, index: int) -> None:
        self._locks.unlock(SHARDS + index)

    def holds(self, index: int) -> bool:
        """Whether this process still has the shard that it has taken."""
        return True

    def owner(self, index: int) -> str:
        return self._locks.owner(SHARDS + index)

    def marker(self, index: int) -> dict[str, Any] | None:
        """The content of a shard's marker, None if the shard must be made: no marker, or damaged files.

        Raises UserError if the shard belongs to another plan, whose plan.json was removed.
        """
        path = self._marker(index)
        if not path.exists():  # before it is read: another process may write it in between
            return None
        try:
            content = read_record(path, MarkerRecord).content()
        except UserError:
            if path.exists():
                self._report(index, f"{path}: damaged")
            return None
        if not all(name.startswith(f"{self.names[index]}.") for name in content["files"]):
            self._report(index, f"{path}: of another shard")
            return None
        if content.get("plan", self._sha256) != self._sha256:
            raise UserError(
                f"{path} belongs to a shard with other options or other inputs. Move or remove "
                f"{self.directory} and run this again."
            )
        if damage := first_damage(self.directory, content["files"]):
            self._report(index, damage)
            return None
        return content

    def _report(self, index: int, damage: str) -> None:
        if index not in self._reported:
            self._reported.add(index)
            logger.warning(f"{damage}: shard {index} is made again")

    def marked(self) -> list[int]:
        """The shards that have a marker."""
        return [index for index in range(len(self.names)) if self._marker(index).exists()]

    def is_whole(self) -> bool:
        return all(self.marker(index) is not None for index in range(len(self.names)))

    @contextmanager
    def workplace(self, index: int) -> Iterator[Path]:
        """Yields the prefix under which the owner of a shard writes its files.

        At the end what is left there is removed.
        """
        name = self.names[index]
        # This process holds the lock of the shard, so the owners of these directories have been killed.
        for abandoned in self.directory.glob(f".{name}.*.work"):
            shutil.rmtree(abandoned, ignore_errors=True)
        directory = self.directory / f".{name}.{secrets.token_hex(4)}.work"
        try:
            directory.mkdir(parents=True)
            yield directory / name
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def install(self, index: int, prefix: Path, counts: Counts, together: list[str]) -> None:
        """Moves the files of a finished shard into the directory, then writes its marker.

        together: names of the plans for which the shard was made in one go. Raises UserError if the directory
        cannot be written.
        """
        try:
            paths = sorted(prefix.parent.iterdir())
            marker = self._marker_of(paths, counts, together)
            self._write_plan()  # a rank that failed at its first shard may have removed it (forget_if_empty)
            # The order matters, because a kill may come at any point. A marker must never describe files that
            # are being replaced, so the old one goes first; the new one is written when all files are on the
            # disk.
            self._marker(index).unlink(missing_ok=True)
            for old in self.directory.glob(f"{self.names[index]}.*"):
                old.unlink()
            for path in paths:
                flush_to_disk(path)
                path.replace(self.directory / path.name)
            flush_to_disk(self.directory)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be written ({error.strerror or error})") from error
        write_sealed(self._marker(index), marker)

    def finish(self) -> Artifact:
        """Writes the manifest of a plan whose shards are all marked, unless another process has done so."""
        with self._alone():
            artifact = completed(self.plan)
            if artifact is None:
                artifact = self._whole_artifact()
                remove_abandoned(self.directory)
                remove_claims(self.directory)
                write_sealed(self.directory / "manifest.json", artifact.manifest)
        return artifact

    def forget_if_empty(self) -> None:
        """After an error: removes plan.json if no shard is finished and no other process uses the directory.

        The next run may then use other options in the same directory.
        """
        if not self.marked() and self._is_alone():
            (self.directory / "plan.json").unlink(missing_ok=True)
            # OSError if the directory is not empty: it may hold kept answers of a generation server, which
            # stay.
            with suppress(OSError):
                self.directory.rmdir()

    def _is_alone(self) -> bool:
        return self._locks.try_alone()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._locks.lock(_DIRECTORY, lambda owner: logger.info(f"{self.directory}: waiting for {owner}"))
        try:
            yield
        finally:
            self._locks.unlock(_DIRECTORY)

    def _whole_artifact(self) -> Artifact:
        files: dict[str, Any] = {}
        counts: Counts = {}
        for index in range(len(self.names)):
            content = read_record(self._marker(index), MarkerRecord).content()
            files |= content["files"]
            for key, value in content["counts"].items():
                counts[key] = counts.get(key, 0) + value
        return Artifact(self.directory, {**self.plan.content(), "counts": counts, "files": files})

    def _marker_of(self, paths: Iterable[Path], counts: Counts, together: list[str]) -> dict[str, Any]:
        """The content of the marker of a shard that has these files."""
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in paths}
        others = {"together": together} if len(together) > 1 else {}
        return {"plan": self._sha256, "files": files, "counts": counts, **others}

    def _write_plan(self) -> None:
        if not (self.directory / "plan.json").exists():
            write_sealed(self.directory / "plan.json", self.plan.content())

    def _marker(self, index: int) -> Path:
        return self.directory / f"{self.names[index]}.done"
