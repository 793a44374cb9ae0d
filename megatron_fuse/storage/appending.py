"""Files of lines to which one process appends finished work, so that an interruption loses none of it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_fuse.errors import UserError


@contextmanager
def open_for_appending(path: Path, use: str) -> Iterator[BinaryIO]:
    """Opens a new or an existing file for this process alone, at its start.

    use: what the process does with the file, for the error. Raises UserError if another process has it open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process {use}. Wait until it ends, or stop it.") from error
        except OSError:  # a file system without locks
            pass
        file.seek(0)
        yield file


def whole_lines(file: BinaryIO) -> list[bytes]:
    """The lines of an open file, without their ends.

    A last line without an end was being written when the process was killed. It is removed from the file.
    """
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    return content[:whole].split(b"\n")[:-1]
