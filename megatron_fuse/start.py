"""Imported by every command before anything else: a Ctrl-C during the imports, which take seconds, then ends it with one line."""

import signal
import threading

from megatron_fuse.interrupts import end_at_once

if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, end_at_once)  # until errors.exit_code takes over
