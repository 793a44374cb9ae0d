"""Counts the work of one rendering of a chat template, and enforces its limits.

The limits grow with the messages, so that long conversations stay within them. Only one thing depends on the
clock: a template that computes longer than `SECONDS` is refused.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.utils import Namespace

OUTPUT = 256 * 1024  # characters that it may print, plus 16 for each character of the messages
TEXT = 1_000_000  # characters, or members, of one value
WORK = 15_000_000  # characters of all values together: see Meter
STEP = 150  # how many characters one step counts as
SECONDS = 20.0  # of this thread's CPU time


class TemplateLimit(jinja2.TemplateError):
    """The template exceeds a limit, or its text would differ from run to run."""


class Meter:
    """The work of one rendering. turns, characters: the size of its messages. The limits grow with both.

    Work is counted in characters that are made. A step of the program counts as STEP characters.
    """

    def __init__(self, turns: int = 0, characters: int = 0) -> None:
        self.work, self.checkpoint = 0, STEP
        # A template may loop over all pairs of turns, and read the text of all messages for each turn.
        self.most_work = WORK + (turns + 16) * characters + STEP * (100 * turns * turns + 10 * characters)
        self.largest = TEXT + 16 * characters
        self.longest_output = OUTPUT + 16 * characters
        self.began = time.thread_time()

    def step(self, characters: int = 0) -> None:
        self.work += STEP + characters
        if self.work > self.checkpoint:
            self._check()

    def _check(self) -> None:
        """Called about every hundred steps only, because it reads the clock."""
        self.checkpoint = self.work + 100 * STEP
        if self.work > self.most_work:
            raise TemplateLimit("it computes more than any prompt needs; perhaps one of its loops never ends")
        if time.thread_time() - self.began > SECONDS:
            raise TemplateLimit(f"it computes for more than {SECONDS:.0f} seconds")

    def expect(self, size: int) -> None:
        """Call this before a value of about this size is made. Raises TemplateLimit if it is too large."""
        if size > self.largest:
            raise TemplateLimit(f"it makes a value of {size:,} characters, more than {self.largest:,}")

    def admit(self, value: Any) -> Any:
        """Counts a value that has been made, and returns it. Raises TemplateLimit if it is too large."""
        size = 0
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, list | tuple | dict):
            size = self.size(value)
        if size > self.largest:
            self.expect(size)
        self.step(size)
        return value

    def size(self, value: Any) -> int:
        """The number of characters and members of a value in print.

        An object that the value holds twice counts twice, because it is printed twice. Counting stops at
        `largest`.
        """
        total, members, stack = 0, 0, [value]
        while stack and total <= self.largest:
            part = stack.pop()
            members += 1
            total += 1
            if isinstance(part, str):
                total += len(part)
            elif isinstance(part, list | tuple):
                stack += part
            elif isinstance(part, dict):
                stack += part.keys()
                stack += part.values()
            elif isinstance(part, Namespace):
                stack += object.__getattribute__(part, "_Namespace__attrs").values()
            if len(stack) > self.largest:
                total = len(stack)
        self.step(members * STEP // 8)
        return total


_meter: ContextVar[Meter] = ContextVar("meter")


def current_meter() -> Meter:
    """The meter of the current rendering or compilation."""
    return _meter.get()


@contextmanager
def metered(meter: Meter) -> Iterator[Meter]:
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)
