"""Progress of long work: from time to time a line with what is done, the rate, and the time that is left."""

import time
from collections.abc import Callable

from megatron_fuse.text_safety import say

INTERVAL = 30.0  # seconds between two lines

Report = Callable[[float, float, str], None]  # see Progress.update


def silent(done: float, left: float, note: str) -> None:
    """A Report that says nothing."""


class Progress:
    """Prints lines about one piece of work, whose parts follow one another.

    where: the begin of every line, such as the directory that is made. unit: what is counted. progress:
    prints one line. most: the time left is an upper bound, and the line says so. clock: returns seconds.
    """

    def __init__(
        self,
        where: object,
        unit: str,
        progress: Callable[[str], None] = say,
        *,
        most: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.where, self.unit, self._progress, self._most, self._clock = where, unit, progress, most, clock
        self.begin("")

    def begin(self, part: str) -> None:
        """Starts a part, of which nothing is done yet."""
        self._part = f"{part}: " if part else ""
        self._began = self._said = self._clock()
        self._done, self._last = 0.0, self._began

    def update(self, done: float, left: float, note: str) -> None:
        """Prints a line about the present part if the last line is at least INTERVAL seconds old.

        Call this often.

        done, left: units of the part that are done and that are left. note: the state in words. If nothing
        was done since the last line, the new line says for how long.
        """
        now = self._clock()
        if done > self._done:
            self._done, self._last = done, now
        if now - self._said < INTERVAL:
            return
        stalled = self._last <= self._said
        self._said = now
        seconds = now - self._began
        if stalled:
            state = f"nothing new for {now - self._last:,.0f} s"
        else:
            rest = f"{'at most ' * self._most}{readable_seconds(left * seconds / done)} left"
            state = f"{readable_rate(done / seconds, self.unit)}, {rest}"
        self._progress(f"{self.where}: {self._part}{note}, {state}")


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
