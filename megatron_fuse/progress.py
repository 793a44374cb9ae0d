"""How far a long piece of work has come, said from time to time, with its rate and the time that the rest takes."""

import time
from collections.abc import Callable

from megatron_fuse.text_safety import say

INTERVAL = 30.0  # seconds between two lines

Report = Callable[[float, float, str], None]  # see Progress.update


def silent(done: float, left: float, note: str) -> None:
    """A Report that says nothing."""


class Progress:
    """Lines about the parts of one piece of work, one part after the other.

    where: what every line begins with, as the directory that is made. unit: of what is counted. most: what is said to be left is the
    most that it can be. clock: in seconds.
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
        """A part begins, of which nothing is done yet."""
        self._part = f"{part}: " if part else ""
        self._began = self._said = self._clock()
        self._done, self._last = 0.0, self._began

    def update(self, done: float, left: float, note: str) -> None:
        """So many units are done of the part, and so many left; note says it in the words of the work. To be called often.

        Speaks where the last line is INTERVAL old. Where nothing is new since then it says how long that has been so.
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
    """In the shortest period in which there is one at least: 12.5 answers/s, 4.0 answers/min, 0.5 answers/h."""
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
