"""Imported by every command before anything else, for the imports, which take seconds: a Ctrl-C then ends it with one line, and
the garbage collector, which would look for garbage among millions of new objects, waits for errors.exit_code. A command that imports
large libraries later does it within `importing`, which has the same effect."""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fuse.interrupts import end_at_once


@contextmanager
def importing() -> Iterator[None]:
    """A block of imports within a running command. Nothing is begun yet, so that Ctrl-C and SIGTERM end the process at once.

    An exception in the middle of an import would be lost, or told as another one, by libraries that catch what their imports raise.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(
                handler := signal.getsignal(number)
            ):  # what is ignored stays ignored, and what kills goes on to kill
                handlers[number] = signal.signal(number, end_at_once)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.freeze()  # what has been imported stays
            gc.enable()
        for number, handler in handlers.items():
            signal.signal(number, handler)


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, end_at_once)  # until errors.exit_code takes over
gc.disable()
