"""Every command imports this module first.

It prepares the process for the imports that follow, which take seconds. A Ctrl-C during the imports ends the
command with one line. The garbage collector is off until errors.exit_code: it would search millions of new
objects and find nothing. A command that imports large libraries later does so within `importing`, which has
the same effect.
"""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fuse.interrupts import end_at_once


@contextmanager
def importing() -> Iterator[None]:
    """A block of imports within a running command.

    Ctrl-C and SIGTERM end the process at once, as no work has begun yet. KeyboardInterrupt would not do:
    libraries catch exceptions of their imports, and then drop them or raise others.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # SIG_IGN and SIG_DFL are not callable: an ignored signal stays ignored, and a killing one still
            # kills.
            if callable(handler := signal.getsignal(number)):
                handlers[number] = signal.signal(number, end_at_once)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.freeze()  # the imported objects stay for ever: no collection has to look at them
            gc.enable()
        for number, handler in handlers.items():
            signal.signal(number, handler)


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, end_at_once)  # until errors.exit_code takes over
gc.disable()
