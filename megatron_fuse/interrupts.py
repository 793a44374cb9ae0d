"""Ctrl-C and SIGTERM: a command ends with one line that says how to go on, and with 128 + the signal's number
(130, 143).

Only the command that the user started prints this line. Under torchrun only rank 0 prints it. A command that
another command of this project started prints nothing.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_fuse.processes import STARTED

# Seconds within which a second signal counts as the first: a terminal and torchrun both send the same Ctrl-C
# to a rank.
_TWICE = 1.0


def end_at_once(number: int, _: FrameType | None) -> None:
    """Signal handler for a time in which there is nothing to clean up, such as the imports."""
    _say(number)
    os._exit(128 + number)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within this block the first SIGINT or SIGTERM raises KeyboardInterrupt, and a later SIGINT ends the
    process at once.

    Yields the list of signals received so far. The caller needs it because code that the interrupt breaks may
    raise another exception in place of KeyboardInterrupt. A signal that is ignored stays ignored, as under
    nohup. Under torchrun SIGTERM still kills the process: a rank that waits in a collective for a dead rank
    would not notice an exception. Only the main thread can set handlers; in other threads the block changes
    nothing.
    """
    owner, received, began = os.getpid(), list[int](), 0.0

    def receive(number: int, _: FrameType | None) -> None:
        nonlocal began
        if os.getpid() != owner:  # a fork inherits this handler: its parent prints the message
            os._exit(128 + number)
        if not received:
            received.append(number)
            began = time.monotonic()
            # Else a pool would wait at its exit until its processes finish their work.
            for child in multiprocessing.active_children():
                child.terminate()
            raise KeyboardInterrupt
        if number == signal.SIGINT and time.monotonic() - began > _TWICE:
            os._exit(128 + number)

    handled = [signal.SIGINT] if "TORCHELASTIC_RUN_ID" in os.environ else [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        handled = []
    before = {number: signal.getsignal(number) for number in handled}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        # After a signal the handler stays until the interpreter has ended: a further signal during the
        # shutdown would otherwise print a traceback.
        if not received:
            for number, handler in before.items():
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default if handler is end_at_once else handler)


def report_interrupt(number: int) -> int:
    """Prints how to go on after this signal. Returns the exit code, 128 + number."""
    _say(number)
    return 128 + number


def _say(number: int) -> None:
    if (
        STARTED in os.environ
        or os.environ.get("RANK", "0") != "0"
        or multiprocessing.parent_process() is not None
    ):
        return
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    sys.stderr.flush()
    line = f"{what}: finished work is kept. Run the same command again to continue.\n"
    # A terminal shows ^C on the present line: begin a new one.
    os.write(2, ("\n" * os.isatty(2) + line).encode())
