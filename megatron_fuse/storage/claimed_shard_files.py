"""The files of one plan while processes make it that take its shards by claim (claims.py says how).

DIRECTORY/.shard-00003.OWNER-1.work/    files of the shard in work, in a directory of the claim's own: entry 1
                                        of its chain, made by OWNER
.DIRECTORY.claims/                      beside the directory: the claims

A shard is published in two steps. First its files and its marker are whole in the claim's directory, and the
claim is committed. Then they are renamed into their places, the marker last. The second step can be done, or
continued, by any process: who claims a shard that has been committed before does so first. So an owner that
is killed or stopped between the two leaves neither half a shard nor a shard for which others wait. Two
processes may do the second step at once: each file can be renamed out of the claim's directory only once.

What a process reads decides nothing before it has a claim and a directory in the artifact. A client of NFS
may not see a new marker for a minute, but it asks the server again after it has changed the directory itself.

If the file system has locks, the owner of a claim also holds the shard's lock, shared with all claims on it.
So these processes and those that take shards by lock (ShardFiles) leave each other's shards alone.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from megatron_fuse.errors import UserError
from megatron_fuse.storage.artifact import Artifact, Plan, completed
from megatron_fuse.storage.claims import Claims, claims_directory, remove_claims, unless_gone
from megatron_fuse.storage.files import flush_to_disk, remove_abandoned, write_sealed
from megatron_fuse.storage.locks import NoLocks
from megatron_fuse.storage.shard_files import SHARDS, Counts, ShardFiles


class TakenOver(Exception):
    """Another process has taken the shard over, because this one did not renew its claim in time."""


class ClaimedShardFiles(ShardFiles):
    """As ShardFiles, with claims in the place of locks. lease: in seconds."""

    def __init__(self, plan: Plan, lease: float) -> None:
        super().__init__(plan)
        self._claims = Claims(claims_directory(plan.directory), lease)
        self._has_locks = False

    def __enter__(self) -> "ClaimedShardFiles":
        with ExitStack() as stack:
            with suppress(NoLocks):
                stack.enter_context(self._locks)
                self._has_locks = True
            stack.enter_context(self._claims)
            # A manifest that is there all the same is damaged, or describes damaged files. If another process
            # has just written it anew, this one writes it again at its end.
            if completed(self.plan) is None:
                (self.directory / "manifest.json").unlink(missing_ok=True)
                self._write_plan()
                completed(self.plan)  # raises if another process has begun another plan
            self._entered = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()
        # What a process leaves that was late, or that came after the artifact was complete.
        if (self.directory / "manifest.json").exists():
            remove_claims(self.directory)
            remove_abandoned(self.directory)

    def is_taken(self, index: int) -> bool:
        return self._claims.is_taken(index)

    def try_lock(self, index: int) -> bool:
        if self._has_locks and not self._locks.try_lock(SHARDS + index, shared=True):
            return False  # a process that works by locks makes the shard
        if not self._claims.take(index):
            self._unlock_file(index)
            return False
        try:
            # Only now: an owner that was taken over cannot commit any more.
            if label := self._claims.committed(index):
                self._publish(index, self._work(index, label))
            self._own_work(index).mkdir(parents=True)
        except BaseException as error:
            self.unlock(index)
            if isinstance(error, OSError):
                raise UserError(f"{self.directory}: cannot be written ({error.strerror})") from error
            raise
        return True

    def unlock(self, index: int) -> None:
        work = self._own_work(index)
        if not self._claims.release(index):
            shutil.rmtree(work, ignore_errors=True)
        self._unlock_file(index)

    def holds(self, index: int) -> bool:
        return self._claims.holds(index)

    def owner(self, index: int) -> str:
        last = self._claims.last(index)
        return last.process if last else "another process"

    @contextmanager
    def workplace(self, index: int) -> Iterator[Path]:
        yield self._own_work(index) / self.names[index]

    def install(self, index: int, prefix: Path, counts: Counts, together: list[str]) -> None:
        """Commits the claim and publishes the shard.

        Raises TakenOver if another process has taken the claim over, UserError if the directory cannot be
        written.
        """
        work = prefix.parent
        try:
            paths = sorted(work.iterdir())
            write_sealed(work / self._marker(index).name, self._marker_of(paths, counts, together))
            for path in paths:
                flush_to_disk(path)
            self._write_plan()  # a process that failed at its first shard may have removed it
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be written ({error.strerror or error})") from error
        if not self._claims.commit(index):
            raise TakenOver
        self._publish(index, work)

    def _publish(self, index: int, work: Path) -> None:
        """Renames the files of a committed claim into their places, unless another process has done so."""
        marker = self._marker(index)
        try:
            content = (work / marker.name).read_bytes()
        except FileNotFoundError:  # it is renamed last
            return
        try:
            files = list(json.loads(content)["files"])
        except (ValueError, KeyError, TypeError):  # damaged: the shard is made again
            shutil.rmtree(work, ignore_errors=True)
            return
        try:
            # A damaged shard is made again. Its old marker must not describe files that are being replaced.
            with unless_gone():
                if marker.read_bytes() != content:
                    marker.unlink()
            for name in files:
                with unless_gone():
                    (work / name).replace(self.directory / name)
            for old in self.directory.glob(f"{self.names[index]}.*"):
                if old.name not in files and old != marker:
                    old.unlink(missing_ok=True)
            flush_to_disk(self.directory)
            with unless_gone():
                (work / marker.name).replace(marker)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be written ({error.strerror or error})") from error
        shutil.rmtree(work, ignore_errors=True)

    def finish(self) -> Artifact:
        """Writes the manifest of a plan whose shards are all marked, unless another process has done so."""
        artifact = completed(self.plan)
        if artifact is None:
            artifact = self._whole_artifact()
            # What is late from here on is not published: no shard is left, and no claim.
            remove_claims(self.directory)
            for work in self.directory.glob(".*.work"):
                shutil.rmtree(work, ignore_errors=True)
            try:
                write_sealed(self.directory / "manifest.json", artifact.manifest, once=True)
            except UserError:  # another process has finished, and has removed this one's temporary file
                if completed(self.plan) is None:
                    raise
            remove_abandoned(self.directory)
        return artifact

    def forget_if_empty(self) -> None:
        super().forget_if_empty()
        if not (self.directory / "plan.json").exists():
            remove_claims(self.directory)

    def _is_alone(self) -> bool:
        return self._claims.is_alone() and (not self._has_locks or super()._is_alone())

    def _write_plan(self) -> None:
        if not (self.directory / "plan.json").exists():
            write_sealed(self.directory / "plan.json", self.plan.content(), once=True)

    def _own_work(self, index: int) -> Path:
        return self._work(index, self._claims.label(index))

    def _work(self, index: int, label: str) -> Path:
        return self.directory / f".{self.names[index]}.{label}.work"

    def _unlock_file(self, index: int) -> None:
        if self._has_locks:
            self._locks.unlock(SHARDS + index)
