"""Locks between processes, on one machine or on several that share a file system.

They are POSIX record locks (fcntl.lockf), each on one byte of a small file beside the files that it protects.
The system releases a lock when its process ends, even if the process is killed. A forked child does not
inherit it. NFS supports it. Each lock has a record of RECORD bytes: the first byte is locked, and the text
names the owner for the messages of other processes.
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


class NoLocks(UserError):
    """The file system has no locks."""


class LockFile:
    """The locks of one file, numbered from 1. A context manager: at its end this process holds none of them.

    The last process that uses the file removes it. Only one LockFile of a path may be open in a process:
    closing a file releases all locks that the process has on it. Raises UserError if the file cannot be made,
    NoLocks if its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "LockFile":
        try:
            while True:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                except FileNotFoundError:  # another process removed the directory between mkdir and open
                    continue
                # Waits while a leaving process has taken this lock alone (try_alone) and removes the file.
                # The file that is open here is then deleted, and a lock on it would exclude no process: open
                # the path again.
                fcntl.lockf(self._file, fcntl.LOCK_SH, 1, _PRESENCE)
                if self._is_current():
                    return self
                os.close(self._file)
        except OSError as error:
            raise self._refused(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._remove_if_alone():
            return
        # If two processes end at the same time, each sees the lock of the other, and neither removes the
        # file. The first attempt has closed the file and so released the lock of this process: the process
        # that looks last is alone.
        with suppress(OSError):
            self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            self._remove_if_alone()

    def _remove_if_alone(self) -> bool:
        """Removes the file if no other process uses it, and closes it.

        Returns whether no other process used it.
        """
        try:
            alone = self.try_alone()
            # Else the file is removed already, and the path may name a new one.
            if alone and self._is_current():
                with suppress(OSError):
                    self.path.unlink()
            return alone
        finally:
            os.close(self._file)

    def try_lock(self, number: int, *, shared: bool = False) -> bool:
        """Takes lock `number` if no other process has it. Returns whether this process holds it now.

        shared: any number of processes may have the lock that also take it shared. Does not wait. Raises
        UserError if the file was removed, or if the system refuses the lock for another reason.
        """
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, 1, number * RECORD)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise self._refused(error) from error
        # A user may have removed the file: processes that open the path now would take locks of a new file.
        if not self._is_current():
            raise UserError(f"{self.path} was removed while this process used it. Run the command again.")
        # If the disk is full, the lock still holds. Only the messages lack the name.
        with suppress(OSError):
            os.pwrite(self._file, own_name().encode()[:RECORD].ljust(RECORD, b"\0"), number * RECORD)
        return True

    def lock(self, number: int, waiting: Callable[[str], None]) -> None:
        """Waits for lock `number`. waiting(owner) is called at once if another process has it, then every
        minute.
        """
        reminder = time.monotonic()
        while not self.try_lock(number):
            if time.monotonic() >= reminder:
                waiting(self.owner(number))
                reminder = time.monotonic() + _REMINDER
            time.sleep(_POLL)

    def unlock(self, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number * RECORD)

    def owner(self, number: int) -> str:
        """Process, host and start time of the last owner of a lock, for messages."""
        text = os.pread(self._file, RECORD, number * RECORD).rstrip(b"\0").decode(errors="replace")
        return "".join(character for character in text if character.isprintable()) or "another process"

    def try_alone(self) -> bool:
        """Whether no other process uses the file.

        If so, a process that opens it waits until this one closes it.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _PRESENCE)
        except OSError:
            return False
        return True

    def _is_current(self) -> bool:
        """Whether the path still names the file that is open here, and not a newer one or none."""
        with suppress(OSError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        return False

    def _refused(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return NoLocks(
                f"{self.path}: this file system has no POSIX locks ({error.strerror}), so two processes "
                "could damage each other's files. Choose a workdir on a file system that has locks (Lustre: "
                "mount it with -o flock), or run the stages of the data with --claim, which needs none."
            )
        if isinstance(error, FileExistsError):  # from mkdir
            return UserError(
                f"{self.path.parent}: cannot be written (Not a directory). Choose another place."
            )
        return UserError(f"{self.path}: cannot be written ({error.strerror})")


def own_name() -> str:
    """This process, its host and the time, for the messages of other processes."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()[:64]} since {since}"
