"""Stops a run before its schedule ends: at a signal, after a time, or after a number of steps. All ranks stop
after the same step.

A batch system sends SIGTERM or SIGUSR1 some time before it kills a job. torchrun forwards SIGTERM to all
ranks, kills the ranks that still run after 30 s, and exits with a code other than 0 even if all ranks exit
with 0. It does the same with SIGUSR1 only if TORCHELASTIC_SIGNALS_TO_HANDLE names it; otherwise SIGUSR1 ends
torchrun itself. SIGINT is a Ctrl-C: the run saves as well,
and exits with 130 as every command does then (interrupts.py).
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
# A Ctrl-C within so many seconds after the first one counts as the same: the process that started the
# training forwards the first after 5 s (processes.run_tied).
_AGAIN = 10.0


class Interruption:
    """The trainer asks it between two steps whether to stop (`reason`).

    Within its `with` block SIGNALS do not kill the process: they are recorded until the next question. A
    second Ctrl-C acts at once. A signal that the process ignores outside the block stays ignored.

    signals: whether to handle SIGNALS at all.
    interval: stop after a step whose number is a multiple of it.
    minutes: stop if this process is at least so old, with the time of loading, as batch systems count it.
    device: where the all-reduce of `reason` runs.
    data_check: its status is part of that all-reduce, and damaged data raise UserError on all ranks.
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
        # An ignored signal stays ignored: a shell lets the background jobs of a script ignore SIGINT.
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
        elif (
            number == signal.SIGINT
            and now - self._since > _AGAIN
            and callable(before := self._before[number])
        ):
            before(number, frame)

    def reason(self, iteration: int) -> str | None:
        """The reason to stop after this step, None to continue.

        All ranks must call it, and all get the same answer.

        One all-reduce of three integers over all ranks:
        a signal may reach only some of them, and their clocks differ.
        """
        late = self.minutes is not None and time.time() - self._started >= 60 * self.minutes
        local = [self._received, int(late), self.data_check.status]
        highest = torch.tensor(local, dtype=torch.int32, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        number, late, status = highest.tolist()
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
    """Blocks SIGNALS for the processes that start in this block.

    This process receives them at the end of the block.

    torchrun and batch systems send a signal to whole process groups. Without the block it would kill the
    checkpoint's writers just when the last checkpoint is being saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
