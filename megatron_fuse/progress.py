"""How long work shows itself: a bar on a terminal, elsewhere a line a minute, and at its end a line about
what was made.

The bar and the lines have the same words: what is done of all, the rate, and the time that is left.
"""

import logging
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from megatron_fuse.claiming import claiming
from megatron_fuse.errors import shortened
from megatron_fuse.logs import stderr_handler
from megatron_fuse.text_safety import printable

logger = logging.getLogger(__name__)

INTERVAL = 60.0  # seconds between two lines
_REDRAW = 0.1  # seconds between two drawings of the bar
_BAR = 12  # its columns

Report = Callable[[int, int, float | None], None]  # Progress.update


def silent(items: int, tokens: int, share: float | None) -> None:
    """A Report that shows nothing."""


class Progress:
    """A context manager around one piece of long work, such as a stage. Its parts follow one another.

    what: the begin of every line, such as the directory that is made. unit: what is counted, in the plural.
    total: how many there are; already: how many of them were there before. most: the time left is an upper
    bound, and the words say so. clock: returns seconds.
    """

    def __init__(
        self,
        what: object,
        unit: str,
        total: int,
        *,
        already: int = 0,
        most: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.unit, self.total, self.already = printable(str(what)), unit, total, already
        self._most, self._clock = most, clock
        self._bar: Any = None  # tqdm's

    def __enter__(self) -> Self:
        self._began = self._shown = self._news = self._clock()
        # Items, and tokens of this process, before the present part.
        self._done, self._tokens = self.already, 0
        self.begin_part(self.total - self.already)
        handler = stderr_handler()
        self._bar = handler.open_bar(lambda: _make_bar(self.total)) if handler else None
        self._show(self._began, INTERVAL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar and (handler := stderr_handler()):
            handler.close_bar()
            self._bar = None
        if kind is None:
            self._log_summary()

    def begin_part(self, size: int) -> None:
        """Starts a part of `size` items, of which nothing is done yet. The first part is all that is left."""
        self._size, self._items, self._part_tokens, self._share = size, 0, 0, 0.0

    def found(self, items: int) -> None:
        """So many items of the present part were there before, as after an interruption within it."""
        self.already += items
        self.update(items)

    def update(self, items: int, tokens: int = 0, share: float | None = None) -> None:
        """Shows the state of the present part, if the bar or the last line is old enough. Call this often.

        items: how many of the part are done. tokens: how many tokens this process has read or written for
        them, 0 if they are not known. share: how much of the part's work is done, from 0 to 1, if that says
        more than the number of items.
        """
        now = self._clock()
        share = items / self._size if share is None and self._size else share or 0.0
        if (items, tokens, share) != (self._items, self._part_tokens, self._share):
            self._items, self._part_tokens, self._share, self._news = items, tokens, share, now
        self._show(now)

    def advance(self, items: int = 1) -> None:
        """So many further items of the part are done."""
        self.update(self._items + items, self._part_tokens)

    def end_part(self, done: int) -> None:
        """The part is done. done: items of the whole that are done now, also those of other processes."""
        self._tokens += self._part_tokens
        self._done, self._news = done, self._clock()
        self.begin_part(self.total - done)
        self._show(self._news)

    def _state(self, now: float) -> str:
        """For example `25%, 5/20 examples, 812 tokens/s, 40 s left`.

        After a minute without news, how long that is.
        """
        work, seconds = self._work(), now - self._began
        new = work - self.already
        percent = int(100 * work / self.total) if self.total else 100
        parts = [f"{percent}%", f"{self._done + self._items:,}/{self.total:,} {self.unit}"]
        if now - self._news >= INTERVAL:
            parts.append(f"nothing new for {readable_seconds(now - self._news)}")
        elif new > 0 and seconds > 0:
            left = readable_seconds((self.total - work) * seconds / new)
            tokens = self._tokens + self._part_tokens
            parts += [self._rate(new, tokens, seconds), f"{'at most ' * self._most}{left} left"]
        return ", ".join(parts)

    def _rate(self, items: float, tokens: int, seconds: float) -> str:
        return (
            readable_rate(tokens / seconds, "tokens") if tokens else readable_rate(items / seconds, self.unit)
        )

    def _show(self, now: float, age: float | None = None) -> None:
        """Draws the bar, or writes a line. age: seconds since the last time, by default measured."""
        if (now - self._shown if age is None else age) < (_REDRAW if self._bar else INTERVAL):
            return
        self._shown = now
        if not self._bar:
            logger.info(f"{self.what}: {self._state(now)}")
            return
        state = self._state(now)
        room = (self._bar.format_dict["ncols"] or 80) - len(state) - _BAR - len("|| : ") - 1
        self._bar.n = min(self._work(), self._bar.total) if self.total else 1
        self._bar.set_description_str(f" {shortened(self.what, max(room, 8))}: {state}")

    def _work(self) -> float:
        """Items that are done, with the share of the present part."""
        return self._done + self._share * self._size

    def _log_summary(self) -> None:
        seconds, done = self._clock() - self._began, self._done + self._items
        made = done - self.already
        # Items are those of all processes, tokens only this one's: of several, the sum is not known here.
        is_shared = int(os.environ.get("WORLD_SIZE", "1")) > 1 or claiming() is not None
        tokens = 0 if is_shared else self._tokens + self._part_tokens
        if not made and done == self.total:
            log_complete(self.what, self.total, self.unit)
            return
        amounts = [f"{made:,} {self.unit}", *([f"{tokens:,} tokens"] if tokens else [])]
        rate = f", {self._rate(made, tokens, seconds)}" if seconds > 0 else ""
        line = f"{self.what}: made {', '.join(amounts)} in {readable_seconds(seconds)}{rate}"
        line += f"; {self.already:,} were there already" if self.already else ""
        logger.info(line + (f"; {self.total - done:,} are left" if done < self.total else ""))


def log_complete(what: object, total: int, unit: str) -> None:
    """The line at the end of work that was done before."""
    logger.info(f"{what}: already complete, {total:,} {unit}")


def _make_bar(total: int) -> Any:
    from tqdm import tqdm  # takes a tenth of a second, and only a terminal needs it

    class Bar(tqdm):
        monitor_interval = 0  # no thread: a process with threads must not fork

    form = f"|{{bar:{_BAR}}}|{{desc}}"
    return Bar(total=max(total, 1), bar_format=form, leave=False, dynamic_ncols=True, disable=False)


def readable_rate(per_second: float, unit: str) -> str:
    """A rate per second, minute or hour: the shortest in which the rate is at least 1, else per hour.

    For example 12.5 answers/s, 4.0 answers/min, 0.5 answers/h.
    """
    periods = {"s": 1, "min": 60, "h": 3600}
    period = next((name for name, seconds in periods.items() if per_second * seconds >= 1), "h")
    number = per_second * periods[period]
    return f"{number:,.0f} {unit}/{period}" if number >= 100 else f"{number:.1f} {unit}/{period}"


def readable_seconds(seconds: float) -> str:
    if seconds < 1:
        return "< 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
