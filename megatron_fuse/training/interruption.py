"""A run that stops before its schedule ends: at a signal, after a time, or after so many steps; all ranks after the same step.

SIGTERM and SIGUSR1 are what a batch system sends some time before it kills. To torchrun itself one sends SIGTERM: it passes it
on to every rank, kills after 30 s what still runs, and ends with a code other than 0 although its ranks end with 0. It does so
with SIGUSR1 too where TORCHELASTIC_SIGNALS_TO_HANDLE names it; without, SIGUSR1 ends torchrun alone. SIGINT is a Ctrl-C: it saves
as well, and the run ends as every command does then (interrupts.py), with 130.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from megatron_fuse.training.data_check import DataCheck

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds in which a second Ctrl-C is the first: what has started a training passes it on after 5 (processes.run_tied).
_AGAIN = 10.0


class Interruption:
    """Asked between two steps whether to stop. Within its `with` block SIGNALS no longer kill but wait for that question; a second
    Ctrl-C does not wait. Of those that are ignored outside, nothing is received.

    signals: whether they do. interval: stop after a step whose number is a multiple of it. minutes: stop once this process is as
    old, loading included, as batch systems count. device: of the one all-reduce of three integers that each question costs.
    data_check: shares that all-reduce, and raises UserError on all ranks where the data are damaged.
    """

    def __init__(
        self,
        *,
        signals: bool = True,
        interval: int | None = None,
        minutes: float | None = None,
        device: torch.device,
        data_check: DataCheck,
    ) -> None:
        self.interval, self.minutes, self.device, self.data_check = interval, minutes, device, data_check
        self.is_interrupt = False  # whether the last reason to stop was a Ctrl-C
        self._handled = SIGNALS if signals else ()
        self._started = psutil.Process().create_time()
        self._received, self._since = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        before = {number: signal.getsignal(number) for number in self._handled}
        # What is ignored stays ignored: a shell starts a script's background jobs without Ctrl-C.
        self._before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._since = number, now
        elif number == signal.SIGINT and now - self._since > _AGAIN and callable(before := self._before[number]):
            before(number, frame)

    def reason(self, iteration: int) -> str | None:
        """Why to stop after this step, None to go on. To be called by all ranks, and the same on all, whichever was asked."""
        late = self.minutes is not None and time.time() - self._started >= 60 * self.minutes
        mine = [self._received, int(late), self.data_check.status]
        asked = torch.tensor(mine, dtype=torch.int32, device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)  # clocks differ between ranks as well
        number, late, status = asked.tolist()
        self.data_check.heed(status)
        self.is_interrupt = number == signal.SIGINT
        if number:
            return f"{signal.Signals(number).name} was received"
        if late:
            return f"--exit-duration-in-mins {self.minutes} have passed"
        if self.interval and iteration % self.interval == 0:
            return f"--exit-interval is {self.interval}"
        return None


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes started in this block do not receive SIGNALS, and this one receives them at its end.

    torchrun and batch systems signal whole process groups. The checkpoint's writers would die of it at the very moment in which
    the last checkpoint is to be saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
