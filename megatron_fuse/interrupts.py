"""Ctrl-C and SIGTERM: a command ends with one line that says how to go on, and with 128 + the signal's number (130, 143).

Only the command that was typed speaks: not the ranks of torchrun but the first, and not what another command of ours has started.
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

STARTED = "MEGATRON_FUSE_STARTED"  # environment variable that a command sets for the commands that it starts
_TWICE = 1.0  # seconds in which a second signal is the first: a terminal and torchrun both send it to a rank


class Interrupted(KeyboardInterrupt):
    """number: of the signal that was received."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def end_at_once(number: int, _: FrameType | None) -> None:
    """Handler for a time in which there is nothing to clean up, as that of the imports."""
    _say(number)
    os._exit(128 + number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block the first SIGINT or SIGTERM raises Interrupted, and a later SIGINT ends the process at once.

    What is ignored stays ignored, as under nohup. Under torchrun SIGTERM keeps killing: a rank that waits for a dead one in a
    collective would not notice it. For the main thread; in others the block changes nothing.
    """
    owner, first = os.getpid(), None

    def receive(number: int, _: FrameType | None) -> None:
        nonlocal first
        if os.getpid() != owner:  # a fork: its parent speaks
            os._exit(128 + number)
        if first is None:
            first = time.monotonic()
            for child in multiprocessing.active_children():  # which a pool would wait for until they are done
                child.terminate()
            raise Interrupted(number)
        if number == signal.SIGINT and time.monotonic() - first > _TWICE:
            os._exit(128 + number)

    handled = (signal.SIGINT,) if "TORCHELASTIC_RUN_ID" in os.environ else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        handled = ()
    before = {number: signal.getsignal(number) for number in handled}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        if first is None:  # else it stays until the interpreter is gone, against tracebacks of its last breath
            for number, handler in before.items():
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default if handler is end_at_once else handler)


def report_interrupt(interrupt: KeyboardInterrupt) -> int:
    """Says how to go on; the exit code."""
    number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
    _say(number)
    return 128 + number


def _say(number: int) -> None:
    if STARTED in os.environ or os.environ.get("RANK", "0") != "0":
        return
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    sys.stderr.flush()
    os.write(2, f"\n{what}: what is finished is kept, and the same command continues from there\n".encode())
