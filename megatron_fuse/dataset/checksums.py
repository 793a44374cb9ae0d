"""Verifies fusion data against the checksums in its manifests, once per build and machine,
in background threads.

A checksum takes about a second per GB. So a verified artifact gets a record in the user's cache directory:

    ~/.cache/megatron-fuse/verified/KEY    KEY: hash of the machine and of the artifact's directory

The record holds a hash of the manifest's sha256 and of name, inode, size, mtime and ctime of every file. If a
file is replaced or written to, its inode or ctime changes, even if a tool restores the mtime. Then its
artifact is read again. Another machine, with disks, caches and memory of its own, has records of its own,
even if home and data are shared. If the cache directory cannot be used, every run reads all files again. The
environment variable MEGATRON_FUSE_CACHE replaces ~/.cache/megatron-fuse.
"""

import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_fuse.errors import UserError
from megatron_fuse.storage import Artifact, sha256_of_json, sha256_of_parts, temporary_then_rename

_MOST_THREADS = 4  # one per artifact; more would take the storage from the training that reads the same files


class BackgroundVerification:
    """Compares all files of these artifacts with their manifests, in threads that start at once.

    hashlib releases the interpreter's lock, so that the threads hardly slow a process that waits for its GPU.
    At the end of the `with` block each thread stops after its current file.
    """

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._stopped = threading.Event()
        self._checks: list[Future[None]] = []
        if artifacts:
            threads = min(len(artifacts), _MOST_THREADS, max(len(os.sched_getaffinity(0)) // 2, 1))
            self._pool = ThreadPoolExecutor(threads, "fusion-data-checksums")
            self._checks = [
                self._pool.submit(_verify_once, artifact, self._stopped) for artifact in artifacts
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stopped.set()
        if self._checks:
            self._pool.shutdown(cancel_futures=True)

    @property
    def done(self) -> bool:
        """Whether all files are compared."""
        return all(check.done() for check in self._checks)

    @property
    def failure(self) -> UserError | None:
        """The error of the first artifact that is known to be damaged, or None.

        Raises an error of any other kind.
        """
        for check in self._checks:
            if check.done() and (error := check.exception()) is not None:
                if isinstance(error, UserError):
                    return error
                raise error
        return None

    def wait(self) -> UserError | None:
        """Waits until all files are compared or one is found damaged. Returns the failure."""
        wait(self._checks, return_when=FIRST_EXCEPTION)
        return self.failure


def verify_once(artifacts: Sequence[Artifact]) -> None:
    """Raises UserError if a file differs from its manifest.

    Reads only artifacts without a record on this machine.
    """
    with BackgroundVerification(artifacts) as verification:
        if failure := verification.wait():
            raise failure


def _verify_once(artifact: Artifact, stopped: threading.Event) -> None:
    record = _record(artifact)
    # Taken before the files are read: if a file is written to meanwhile, the record does not match.
    state = _state(artifact)
    if _content(record) == state:
        return
    for name in artifact.manifest["files"]:
        if stopped.is_set():
            return
        path = artifact.directory / name
        try:
            artifact.checked(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}). Restore it, or remove {artifact.directory} and "
                "run the stage again."
            ) from error
    _write(record, state)


def _state(artifact: Artifact) -> str:
    """The content of an artifact's record: its build, and the identity of every file at this moment."""
    files = []
    for name in artifact.manifest["files"]:
        try:
            status = os.stat(artifact.directory / name)
        except OSError:
            files.append([name])  # `checked` raises the error for it
        else:
            files.append([name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return f"{artifact.directory.resolve()} on {_machine()}: {sha256_of_json([artifact.sha256, files])}\n"


def _machine() -> str:
    """Host name and machine id.

    Containers of one image may share the id, and machines may share a name; both together differ.
    """
    try:
        return f"{socket.gethostname()} {Path('/etc/machine-id').read_text(encoding='utf-8').strip()}".strip()
    except (OSError, ValueError):
        return socket.gethostname()


def _record(artifact: Artifact) -> Path | None:
    """The file of an artifact's record; None if there is no cache directory,
    for example for a user without a home."""
    key = sha256_of_parts(os.fsencode(artifact.directory.resolve()), _machine())[:32]
    try:
        named, of_user = os.environ.get("MEGATRON_FUSE_CACHE"), os.environ.get("XDG_CACHE_HOME")
        root = Path(named) if named else Path(of_user or Path.home() / ".cache") / "megatron-fuse"
    except RuntimeError:
        return None
    return root / "verified" / key


def _content(record: Path | None) -> str | None:
    try:
        return record.read_text(encoding="utf-8") if record else None
    except (OSError, ValueError):
        return None


def _write(record: Path | None, state: str) -> None:
    if record is None:
        return
    try:
        with temporary_then_rename(record) as temporary:
            temporary.write_text(state, encoding="utf-8")
    except UserError:  # the next run verifies again
        pass
