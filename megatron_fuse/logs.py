"""Where the messages of a command go: to stderr, a line each, through Python's `logging`.

Every module writes to `logging.getLogger(__name__)`. A program that only imports the library configures
logging as it likes. A command calls `start_logging`. Results that a user asked for go to stdout (`say`).
"""

import argparse
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from megatron_fuse.text_safety import printable

LEVELS = ("debug", "info", "warning", "error")
DEFAULT_LEVEL = "info"
_LIBRARY = logging.getLogger("megatron_fuse")


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """Adds --log-level, which every command has."""
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default=DEFAULT_LEVEL,
        help="the least level of the messages on stderr, and with warning or error no progress (default: "
        "%(default)s)",
    )


class Bar(Protocol):
    """What the handler has to know of a bar on the last line of a terminal."""

    def clear(self) -> None: ...

    def refresh(self) -> None: ...

    def close(self) -> None: ...


class StderrHandler(logging.Handler):
    """Writes records to the present sys.stderr. Messages of all levels above info begin with the level.

    Under torchrun only the logging rank writes info and debug. The other ranks write warnings and errors,
    which begin with the rank. The text holds no character that a terminal would obey.
    """

    def __init__(self, level: int, rank: int | None) -> None:
        """rank: that of torchrun, None without torchrun."""
        super().__init__(level)
        self._rank, self._owner = rank, os.getpid()
        self.is_logging_rank = not rank
        self.bar: Bar | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and not self.is_logging_rank:
            return
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        rank = "" if self.is_logging_rank else f"rank {self._rank}: "
        text = printable(f"{rank}{level}{self.format(record)}", prose=True)
        # A fork has a copy of the bar, which only the process that opened it may draw.
        bar = self.bar if self._owner == os.getpid() else None
        # A full disk or a closed pipe must not end work whose results go elsewhere.
        with suppress(OSError):
            if bar:
                bar.clear()
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
            if bar:
                bar.refresh()

    def open_bar(self, make: Callable[[], Bar]) -> Bar | None:
        """The bar of this process, if it may draw one.

        None on a pipe, on other ranks, and beside another bar.
        """
        if self.bar is None and self.level <= logging.INFO and self.is_logging_rank and self._has_terminal():
            self.bar = make()
            return self.bar
        return None

    def close_bar(self) -> None:
        """Removes the bar from the terminal."""
        if self.bar:
            with suppress(OSError):
                self.bar.close()
            self.bar = None

    def _has_terminal(self) -> bool:
        if self._owner != os.getpid() or multiprocessing.parent_process() is not None:
            return False
        if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            return False
        # A terminal without a width, as some programs open one, would show nothing of a bar.
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0 and _in_foreground()


def _in_foreground() -> bool:
    """False for a job in the background of a shell, which would draw over the job in the foreground."""
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    # The ranks of torchrun have a session of their own: the terminal is not theirs.
    except (OSError, ValueError):
        return True


def start_logging(level: str = DEFAULT_LEVEL) -> None:
    """From now on the library's messages of this level or above go to stderr. level: one of LEVELS."""
    stop_logging()
    number = logging.getLevelNamesMapping()[level.upper()]
    rank = int(os.environ["RANK"]) if "RANK" in os.environ else None
    _LIBRARY.addHandler(StderrHandler(number, rank))
    _LIBRARY.setLevel(number)
    _LIBRARY.propagate = False  # other libraries give the root logger handlers: a line would come twice


def stop_logging() -> None:
    """Undoes start_logging, and removes a bar from the terminal."""
    if handler := stderr_handler():
        handler.close_bar()
        _LIBRARY.removeHandler(handler)
        _LIBRARY.setLevel(logging.NOTSET)
        _LIBRARY.propagate = True


def stderr_handler() -> StderrHandler | None:
    """The handler of start_logging; None if the process has not called it."""
    return next((each for each in _LIBRARY.handlers if isinstance(each, StderrHandler)), None)


def log_level() -> str:
    """The level of start_logging, DEFAULT_LEVEL without it."""
    handler = stderr_handler()
    return logging.getLevelName(handler.level).lower() if handler else DEFAULT_LEVEL


def choose_logging_rank(is_logging_rank: bool) -> None:
    """Whether this rank writes info. Before this call, rank 0 does."""
    if handler := stderr_handler():
        handler.is_logging_rank = is_logging_rank
