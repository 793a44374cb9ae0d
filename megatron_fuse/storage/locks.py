"""Locks between processes, on one machine or on several that share a file system.

POSIX record locks (fcntl.lockf), each on one byte of a small file beside what it protects. The system releases a lock when its
process ends, however it ends, a forked child does not inherit it, and NFS has it too. Each lock has a record of RECORD bytes:
its first byte is what is locked, its text names the owner for the messages of others.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_fuse.errors import UserError

RECORD = 128  # bytes
_PRESENCE = 0  # every process that uses the file holds this record's lock, shared
_POLL = 0.05  # seconds between two tries
_REMINDER = 60.0  # seconds between two messages of a process that waits


class LockFile:
    """The locks of one file, numbered from 1. A context manager: at its end this process holds none of them, and the last process
    that has used the file removes it.

    Only one LockFile of a path may be open in a process: closing a file releases all locks that the process has on it.
    Raises UserError if the file cannot be made, or if its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "LockFile":
        try:
            while True:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                except FileNotFoundError:  # somebody has just removed the directory
                    continue
                fcntl.lockf(self._file, fcntl.LOCK_SH, 1, _PRESENCE)
                if self._is_current():
                    return self
                os.close(self._file)  # the last user removed it between our opening and locking
        except OSError as error:
            raise self._refused(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._remove_if_alone():
            return
        # Two processes that end at once each see the other. Without a lock of its own, the one that looks last is alone.
        with suppress(OSError):
            self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            self._remove_if_alone()

    def _remove_if_alone(self) -> bool:
        """Closes the file. Whether no other process used it."""
        try:
            alone = self.try_alone()
            if alone and self._is_current():  # else it is gone, and the path may be another process's file
                with suppress(OSError):
                    self.path.unlink()
            return alone
        finally:
            os.close(self._file)

    def try_lock(self, number: int) -> bool:
        """Takes lock `number` if no other process has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number * RECORD)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise self._refused(error) from error
        if not self._is_current():
            raise UserError(f"{self.path} was removed while this process used it: run the command again")
        with suppress(OSError):  # a full disk: the lock counts, not the name
            os.pwrite(self._file, _own_name().ljust(RECORD, b"\0"), number * RECORD)
        return True

    def lock(self, number: int, waiting: Callable[[str], None]) -> None:
        """Waits for lock `number`. waiting(owner) is called at once if another process has it, then every minute."""
        reminder = time.monotonic()
        while not self.try_lock(number):
            if time.monotonic() >= reminder:
                waiting(self.owner(number))
                reminder = time.monotonic() + _REMINDER
            time.sleep(_POLL)

    def unlock(self, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number * RECORD)

    def owner(self, number: int) -> str:
        """Host, process and start of the last owner of a lock, for messages."""
        text = os.pread(self._file, RECORD, number * RECORD).rstrip(b"\0").decode(errors="replace")
        return "".join(character for character in text if character.isprintable()) or "another process"

    def try_alone(self) -> bool:
        """Whether no other process uses the file. If so, others that open it wait until this one closes it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _PRESENCE)
        except OSError:
            return False
        return True

    def _is_current(self) -> bool:
        """Whether the path still names the file that is open here."""
        with suppress(OSError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        return False

    def _refused(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return UserError(
                f"{self.path}: this file system has no POSIX locks ({error.strerror}), so that two processes could damage "
                "each other's files: choose a workdir on a file system that has them (Lustre: mount it with -o flock)"
            )
        if isinstance(error, FileExistsError):  # from mkdir
            return UserError(f"{self.path.parent}: cannot be written (Not a directory): choose another place")
        return UserError(f"{self.path}: cannot be written ({error.strerror})")


def _own_name() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()[:64]} since {since}".encode()[:RECORD]
