"""UserError, the one exception for errors that a user can fix, and exit_code, which reports it."""

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
from megatron_fuse.logs import stop_logging
from megatron_fuse.processes import end_with_torchrun
from megatron_fuse.text_safety import printable

_LINE, _LINES = 600, 40  # characters and lines of a message on a terminal


class UserError(Exception):
    """A usage or data error.

    The message names the file, line or key, both values if two disagree, and the fix.
    """


def shortened(text: str, limit: int) -> str:
    """The text itself if it has at most `limit` characters, else its two ends with ` ... ` between them."""
    if len(text) <= limit:
        return text
    kept = limit - len(" ... ")
    return f"{text[: kept - kept // 2]} ... {text[len(text) - kept // 2 :]}"


def exit_code(main: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code: what `main` returns, 0 in place of None.

    A UserError becomes one message on stderr and exit code 2. An OSError is reported the same way if it
    carries a file name (no permission, no such directory) or if the disk is full. Ctrl-C and SIGTERM end with
    one line and 130 or 143 (interrupts.py). Any other exception keeps its traceback.
    """
    # start.py switched the collector off. The imported objects live as long as the process. freeze() leaves
    # them out of every later collection: Megatron-core collects at each save, and would search all of them.
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    end_with_torchrun()
    with interruptible() as signals:
        try:
            try:
                return main() or 0
            finally:
                stop_logging()  # a message at the end must not meet a bar on its line
        except UserError as error:
            return report_interrupt(*signals) if signals else _report(str(error))
        except KeyboardInterrupt:
            return report_interrupt(*signals or [signal.SIGINT])
        except Exception as error:
            if signals:  # the interrupt broke a pool or a connection, which then raised this
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
    # torchrun prints an error page at its end. It quotes what the first failing rank has written to this
    # file.
    if record:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(record).write_text(json.dumps(content), encoding="utf-8")
    if not record or os.environ.get("RANK") == "0":  # most errors occur on every rank: one message is enough
        with suppress(OSError):  # the log lies on a full disk: the exit code still reports the error
            print(f"error: {message}", file=sys.stderr, flush=True)
    return 2
