"""Imported by every command before anything else, for the imports, which take seconds: a Ctrl-C then ends it with one line, and
the garbage collector, which would look for garbage among millions of new objects, waits for errors.exit_code."""

import gc
import signal
import threading

from megatron_fuse.interrupts import end_at_once

if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, end_at_once)  # until errors.exit_code takes over
gc.disable()
