"""The one exception for what a user can fix, and the door through which every command reports it."""

import errno
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_fuse.interrupts import interruptible, report_interrupt
from megatron_fuse.processes import end_with_torchrun
from megatron_fuse.text_safety import printable

_LINE, _LINES = 600, 40  # characters and lines of a message on a terminal


class UserError(Exception):
    """A usage or data error. The message names the file, line or key, both values where two disagree, and the fix."""


def shortened(text: str, limit: int) -> str:
    """The text where it has at most `limit` characters, else its two ends with ` ... ` between them."""
    if len(text) <= limit:
        return text
    kept = limit - len(" ... ")
    return f"{text[: kept - kept // 2]} ... {text[len(text) - kept // 2 :]}"


def exit_code(main: Callable[[], int | None]) -> int:
    """Runs a command, and returns what it returns, or 0; a UserError becomes one message on stderr and exit code 2.

    So does what the operating system says of a named file that no code of ours looks at first: no permission, no such directory.
    Ctrl-C and SIGTERM end with one line and 130 or 143 (interrupts.py). Anything else keeps its traceback.
    """
    if not gc.isenabled():  # as start.py left it
        gc.freeze()  # what has been imported stays: Megatron-core collects at every save, and would look through all of it
        gc.enable()
    end_with_torchrun()
    with interruptible() as signals:
        try:
            return main() or 0
        except UserError as error:
            return report_interrupt(*signals) if signals else _report(str(error))
        except KeyboardInterrupt:
            return report_interrupt(*signals or [signal.SIGINT])
        except Exception as error:
            if signals:  # of a pool or a connection that the interrupt has broken
                return report_interrupt(*signals)
            if not isinstance(error, OSError) or _is_no_users_matter(error):
                raise
            return _report(f"{error.filename or 'writing'}: {error.strerror}")


def _is_no_users_matter(error: OSError) -> bool:
    return error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _report(message: str) -> int:
    lines = [printable(shortened(line, _LINE)) for line in message.split("\n")]
    if len(lines) > _LINES:
        lines[_LINES // 2 : len(lines) - _LINES // 2] = [f"  ... {len(lines) - _LINES} lines ..."]
    message = "\n".join(lines)
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if record:  # torchrun ends with a page of its own, and quotes there what the first failing rank wrote
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(record).write_text(json.dumps(content), encoding="utf-8")
    if not record or os.environ.get("RANK") == "0":  # most errors are those of every rank
        with suppress(OSError):  # a log on a full disk: the exit code says it still
            print(f"error: {message}", file=sys.stderr, flush=True)
    return 2
