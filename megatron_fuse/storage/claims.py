"""Shards that processes take by claim, without locks: on any number of machines over one file system.

    .DIRECTORY.claims/OWNER.claim     beside the artifact. OWNER: 16 digits of one process; the time of the
    .DIRECTORY.claims/OWNER.commit    last change of its .claim is its heartbeat
    .DIRECTORY.claims/OWNER.free
    .DIRECTORY.claims/00003.1         the chain of shard 3: hard links to these files, numbered from 1
    .DIRECTORY.claims/00003.2

A process claims a shard if the chain is empty, or if its last entry is free, a commit, or a stale claim. It
appends a link to its OWNER.claim. When the shard is made, it appends its OWNER.commit and publishes the
files; if it gives up, it appends its OWNER.free. To append is to make the link with the next number, which
fails if the name exists: each number is made once.

Why two owners of a shard cannot both publish. An owner with claim n may publish only if it has made entry
n + 1. Who takes its claim over makes entry n + 1 as well. One of the two succeeds, however long the owner was
stopped, and between whichever of its instructions. No clock takes part in this: a clock only decides when
others lose patience, and a wrong one costs work, not data. Entries are never removed one by one. When all
shards are whole, their directory is renamed before it is removed: the link of a process that is late then
fails, because the file that it links to is gone.

How long a claim is good. A thread of the owner renews the heartbeat every twelfth of the lease. A stopped
process (SIGSTOP) does not renew it. A claim is stale if

- the file system's clock says that the heartbeat is at least a lease old, and this process has seen it
  unchanged for a quarter of the lease: the age is the difference to a file that this process has touched
  just now, so that the server of a network file system stamps both; or
- this process has seen it unchanged for a whole lease.

The time of watching is measured by this process's own monotonic clock. So an owner that is alive keeps its
claim also on file systems that stamp times with the clocks of their clients (Lustre, GPFS), however much
these differ.

What is assumed of the file system. link(2) fails if the new name exists, and rename(2) is atomic; NFS
guarantees both on the server. Not O_EXCL: with NFS 3 a file that is created so has a meaningless time for a
moment. Locks are not needed. A client may show attributes that are up to a minute old (acregmax). Entries are
opened before their time is read, which asks the server. Where it does not (`nocto`), the default lease of
three minutes is still longer than that minute and a renewal together.
"""

import errno
import glob
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_fuse.errors import UserError
from megatron_fuse.storage.locks import own_name

_RENEWALS = 12  # in a lease
_WATCH = 1 / 4  # part of the lease in which a heartbeat must not change

# Errors of a path in a directory that another process has removed; ESTALE over NFS.
_GONE = (errno.ENOENT, errno.ESTALE)

CLAIM, COMMIT, FREE = "claim", "commit", "free"
_KINDS = (CLAIM, COMMIT, FREE)


@contextmanager
def unless_gone() -> Iterator[None]:
    """Ends the block at an error that says that a file or its directory is not there, or no longer."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise


@dataclass(frozen=True)
class Entry:
    """One entry of a chain. process: its owner, for messages. renewed: the owner's last heartbeat, in seconds
    by the file system's clock.
    """

    number: int
    kind: str
    owner: str
    process: str
    renewed: float


def _touch(path: Path) -> float:
    """Sets the time of a file to now, and returns it: by the clock of the file system."""
    os.utime(path)
    return path.stat().st_mtime


class Claims:
    """The claims of this process on the shards of one artifact. A context manager, in which a thread renews
    the heartbeat.

    directory: where the chains are; it is made if it does not exist. clock: seconds of this process. touch:
    sets the time of a file and returns it. Raises UserError if the file system has no hard links, or if the
    directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        lease: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        touch: Callable[[Path], float] = _touch,
    ) -> None:
        self.directory, self.lease = directory, lease
        self._clock, self._touch = clock, touch
        self._held: dict[int, int] = {}  # shard -> number of the claim of this process
        # shard -> the last (number, heartbeat) that this process has seen of it, and since when
        self._seen: dict[int, tuple[tuple[int, float], float]] = {}
        self._end = threading.Event()

    def __enter__(self) -> "Claims":
        self.announce()
        self._thread = threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self.leave()

    def announce(self) -> None:
        """Begins under a new name of an owner."""
        self._owner = secrets.token_hex(8)
        try:
            while True:
                self.directory.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process has removed the directory since
                    for kind in _KINDS:
                        self._file(kind).write_text(f"{kind} {self._owner} {own_name()}\n", encoding="utf-8")
                    self._touch(self._file(CLAIM))
                    return
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be written ({error.strerror})") from error

    def leave(self) -> None:
        """Removes the files of this process. The links to them stay, until the artifact is complete."""
        for kind in _KINDS:
            with suppress(OSError):
                self._file(kind).unlink()
        with suppress(OSError):  # it has chains, or files of other processes
            self.directory.rmdir()

    def _keep_alive(self) -> None:
        while not self._end.wait(self.lease / _RENEWALS):
            self.renew()

    def renew(self) -> None:
        """Renews the heartbeat. If the file system fails for a moment, the next renewal tries it again."""
        with suppress(OSError):
            self._touch(self._file(CLAIM))

    def last(self, index: int) -> Entry | None:
        """The last entry in the chain of a shard."""
        chain = self._chain(index)
        return chain[-1] if chain else None

    def is_taken(self, index: int) -> bool:
        """Whether a process has a claim on the shard that is not stale."""
        last = self.last(index)
        return last is not None and last.kind == CLAIM and not self._is_stale(index, last)

    def take(self, index: int) -> bool:
        """Claims a shard, unless another process has a claim that is not stale. Does not wait."""
        last = self.last(index)
        if last and last.kind == CLAIM and not self._is_stale(index, last):
            return False
        if not self._file(CLAIM).exists():
            # The claims were removed, because the artifact is complete or by the user. Under another name
            # this process can begin anew: what it had claimed under the old one can no longer be published.
            self.announce()
            return False
        number = (last.number if last else 0) + 1
        if not self._append(index, number, CLAIM):
            return False
        self._held[index] = number
        return True

    def commit(self, index: int) -> bool:
        """Decides that the shard is this process's to publish. False if another has taken it over."""
        return self._append(index, self._held[index] + 1, COMMIT)

    def holds(self, index: int) -> bool:
        """Whether the claim is in force or has been committed."""
        number = self._held[index]
        claim, later = self._read(index, number), self._read(index, number + 1)
        return self._is_own(claim) and (later is None or self._is_own(later))

    def release(self, index: int) -> bool:
        """Gives a claim back, unless it was committed or taken over. Returns whether it was committed."""
        number = self._held.pop(index) + 1
        if self._append(index, number, FREE):
            return False
        later = self._read(index, number)
        return later is not None and self._is_own(later) and later.kind == COMMIT

    def label(self, index: int) -> str:
        """A name for the claim that this process has on a shard. No other claim ever has it."""
        return self._label(self._owner, self._held[index])

    def committed(self, index: int) -> str | None:
        """The label of the claim that was committed last, if any was."""
        commits = [entry for entry in self._chain(index) if entry.kind == COMMIT]
        return self._label(commits[-1].owner, commits[-1].number - 1) if commits else None

    def is_alone(self) -> bool:
        """Whether no other process has announced itself, or was killed before it could leave."""
        names: list[str] = []
        with unless_gone():
            names = os.listdir(self.directory)
        return not any(name.endswith(f".{CLAIM}") and name != self._file(CLAIM).name for name in names)

    def _chain(self, index: int) -> list[Entry]:
        chain: list[Entry] = []
        while entry := self._read(index, len(chain) + 1):
            chain.append(entry)
        return chain

    def _label(self, owner: str, number: int) -> str:
        return f"{owner}-{number}"

    def _file(self, kind: str) -> Path:
        return self.directory / f"{self._owner}.{kind}"

    def _path(self, index: int, number: int) -> Path:
        return self.directory / f"{index:05d}.{number}"

    def _is_own(self, entry: Entry | None) -> bool:
        return entry is not None and entry.owner == self._owner

    def _append(self, index: int, number: int, kind: str) -> bool:
        try:
            os.link(self._file(kind), self._path(index, number))
        except FileExistsError:
            # NFS may have lost the reply to a link that was made, and sent the request again.
            entry = self._read(index, number)
            return entry is not None and self._is_own(entry) and entry.kind == kind
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise UserError(
                f"{self.directory}: a hard link cannot be made ({error.strerror}). Choose a workdir on a "
                "file system that has hard links, or run without --claim."
            ) from error
        return True

    def _read(self, index: int, number: int) -> Entry | None:
        try:
            with unless_gone(), self._path(index, number).open(encoding="utf-8") as file:
                kind, owner, process = file.read().rstrip("\n").split(" ", 2)
                return Entry(number, kind, owner, process, os.fstat(file.fileno()).st_mtime)
        except ValueError as error:
            raise UserError(
                f"{self._path(index, number)}: damaged. Stop all processes that work here, remove "
                f"{self.directory} and run this again."
            ) from error
        return None

    def _is_stale(self, index: int, claim: Entry) -> bool:
        state = (claim.number, claim.renewed)
        now = self._clock()
        if index not in self._seen or self._seen[index][0] != state:
            self._seen[index] = (state, now)
        unchanged = now - self._seen[index][1]
        if unchanged < self.lease * _WATCH:
            return False
        if unchanged >= self.lease:
            return True
        with unless_gone():
            return self._touch(self._file(CLAIM)) - claim.renewed >= self.lease
        return False


def claims_directory(artifact: Path) -> Path:
    return artifact.with_name(f".{artifact.name}.claims")


def remove_claims(artifact: Path) -> None:
    """Removes the claims on the shards of an artifact. All its shards are whole, or none was begun."""
    directory = claims_directory(artifact)
    # In one step: if the entries went one by one, a late process could append one.
    with suppress(FileNotFoundError):
        directory.rename(directory.with_name(f"{directory.name}-{secrets.token_hex(4)}"))
    for removed in artifact.parent.glob(f"{glob.escape(directory.name)}-*"):
        shutil.rmtree(removed, ignore_errors=True)
