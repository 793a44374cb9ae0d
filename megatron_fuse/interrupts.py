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

from megatron_fuse.processes import STARTED

_TWICE = 1.0  # seconds in which a second signal is the first: a terminal and torchrun both send it to a rank


def end_at_once(number: int, _: FrameType | None) -> None:
    """Handler for a time in which there is nothing to clean up, as that of the imports."""
    _say(number)
    os._exit(128 + number)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within this block the first SIGINT or SIGTERM raises KeyboardInterrupt, and a later SIGINT ends the process at once.

    Yields the signals received so far: what the interrupt breaks on its way may raise another exception in its place.
    What is ignored stays ignored, as under nohup. Under torchrun SIGTERM keeps killing: a rank that waits for a dead one in a
    collective would not notice it. For the main thread; in others the block changes nothing.
    """
    owner, received, began = os.getpid(), list[int](), 0.0

    def receive(number: int, _: FrameType | None) -> None:
        nonlocal began
        if os.getpid() != owner:  # a fork: its parent speaks
            os._exit(128 + number)
        if not received:
            received.append(number)
            began = time.monotonic()
            for child in multiprocessing.active_children():  # which a pool would wait for until they are done
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
        if not received:  # else it stays until the interpreter is gone, against tracebacks of its last breath
            for number, handler in before.items():
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default if handler is end_at_once else handler)


def report_interrupt(number: int) -> int:
    """Says how to go on after this signal; the exit code."""
    _say(number)
    return 128 + number


def _say(number: int) -> None:
    if STARTED in os.environ or os.environ.get("RANK", "0") != "0" or multiprocessing.parent_process() is not None:
        return
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    sys.stderr.flush()
    line = f"{what}: what is finished is kept, and the same command continues from there\n"
    os.write(2, ("\n" * os.isatty(2) + line).encode())  # a terminal shows ^C before it
