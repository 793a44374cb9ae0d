"""Trainings over a tiny target that tell the test how far they are, so that it can do something to them at
a certain moment.
"""

import dataclasses
import enum
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from killable_ranks import KillableRanks
from synthetic import make_tiny_target
from test_layouts import Recorder, layout, run_training

STEPS = 9  # the first phase ends after 7
TRAINING = {
    "train_iters": STEPS,
    "micro_batch_size": 8,
    "save_interval": 3,
    "save_retain_last": 2,
    "eval_interval": 2,
}
PHASES = ("start", "training", "evaluation", "saving", "a writer at work", "end")
_NOT_YET, _REACHED, _DONE = 0, 1, 2


class Kind(enum.StrEnum):
    RANK = "a rank killed"
    GROUP = "all killed"
    TORCHRUN = "torchrun killed"
    RANK_OF_TORCHRUN = "a rank of torchrun killed"
    STOP = "a rank stopped and continued"


@dataclasses.dataclass(frozen=True)
class Moment:
    """What happens when a job reaches operation `at`: at once, while the process that reached it waits
    there, or `delay` seconds later.
    """

    kind: Kind
    world_size: int
    asynchronous: bool
    at: int
    delay: float
    victim: int  # the rank that is killed or stopped

    @property
    def torchrun(self) -> bool:
        return self.kind in (Kind.TORCHRUN, Kind.RANK_OF_TORCHRUN)


class Watched:
    """What the ranks of one job and the test share: how far it is, and who its processes are."""

    def __init__(self, context: Any, world_size: int, at: int) -> None:
        self.at = at
        self.operations, self.state, self.phase = (context.RawValue("i", 0) for _ in range(3))
        self.pids = context.RawArray("i", world_size)
        self.holds = context.RawValue("b", False)

    def release(self) -> None:
        self.state.value = _DONE

    @property
    def reached(self) -> bool:
        return self.state.value == _REACHED

    def operation(self) -> None:
        # Without a lock, which a killed process might hold: of several that count at once one may pass over
        # `at`.
        self.operations.value += 1
        if self.state.value == _NOT_YET and self.at and self.operations.value >= self.at:
            if os.getpid() not in self.pids[:]:
                self.phase.value = PHASES.index("a writer at work")
            self.state.value = _REACHED
            while self.holds.value and self.state.value == _REACHED:
                time.sleep(0.001)

    def during(self, phase: str, function: Callable) -> Callable:
        def watched(*arguments: Any, **options: Any) -> Any:
            before, self.phase.value = self.phase.value, PHASES.index(phase)
            try:
                return function(*arguments, **options)
            finally:
                self.phase.value = before

        return watched


def run_rank(rank: int, workdir: Path, target: Path, sections: dict[str, Any], shared: Watched) -> None:
    """One rank, which counts as operations what it or its writers do to the work directory, every batch
    and every record.
    """
    from megatron_fuse.training import trainer
    from megatron_fuse.training.checkpoint import CheckpointWriter

    def audit(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if not str(arguments[0]).startswith(str(workdir)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        shared.operation()

    def plan_step(*arguments: Any) -> Any:
        shared.operation()
        return planned(*arguments)

    planned, trainer.plan_step = trainer.plan_step, plan_step
    trainer._evaluate = shared.during("evaluation", trainer._evaluate)
    trainer._run = shared.during("training", trainer._run)
    CheckpointWriter.save = shared.during("saving", CheckpointWriter.save)  # type: ignore[method-assign]
    CheckpointWriter.publish_finished = shared.during("saving", CheckpointWriter.publish_finished)  # type: ignore[method-assign]
    CheckpointWriter.finish = shared.during("saving", CheckpointWriter.finish)  # type: ignore[method-assign]
    shared.pids[rank] = os.getpid()
    sys.addaudithook(audit)
    run_training(workdir, target, sections, LineByLine(workdir / "losses.jsonl", rank == 0))
    shared.phase.value = PHASES.index("end")


class LineByLine(Recorder):
    """Keeps its records on disk, a line each, as the last a killed process wrote."""

    def __init__(self, path: Path, writes: bool) -> None:
        super().__init__()
        self.path, self.writes = path, writes

    def step(self, iteration: int, *arguments: Any) -> None:
        super().step(iteration, *arguments)
        self._write(self.steps[-1])

    def evaluation(self, iteration: int, values: dict, examples: int) -> None:
        self._write({"iteration": iteration, "validation": True, **values})

    def _write(self, record: dict) -> None:
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


class Trainings:
    """Jobs over one tiny target, and what they print where nothing happens to them."""

    def __init__(self, root: Path) -> None:
        self.root, self.target = root, make_tiny_target(root / "target")
        self.ranks = KillableRanks()
        self.counts = Counter[tuple[Kind, str]]()
        self._undisturbed: dict[tuple[int, bool], tuple[dict, int]] = {}

    def undisturbed(self, world_size: int, asynchronous: bool) -> tuple[dict, int]:
        """Records by what they are of, and the number of operations."""
        key = (world_size, asynchronous)
        if key not in self._undisturbed:
            workdir = self.root / f"undisturbed-{world_size}-{asynchronous}"
            shared, children = self.start(workdir, world_size, asynchronous)
            assert self.ranks.wait(children) == [0] * world_size, outputs(workdir)
            self._undisturbed[key] = self.records(workdir), shared.operations.value
        return self._undisturbed[key]

    def records(self, workdir: Path) -> dict[tuple[int, bool], dict]:
        """The records of a job that was started once or several times. Fails where two of one step differ."""
        found = dict[tuple[int, bool], dict]()
        for line in map(json.loads, (workdir / "losses.jsonl").read_text().splitlines()):
            key = line["iteration"], line.get("validation", False)
            assert found.setdefault(key, line) == line
        return found

    def start(
        self,
        workdir: Path,
        world_size: int,
        asynchronous: bool,
        at: int = 0,
        *,
        holds: bool = False,
        torchrun: bool = False,
        save: Path | None = None,
    ) -> tuple[Watched, list[Any]]:
        """at: the operation of which the test is to know, from 1; holds: whoever comes to it waits there."""
        shared = Watched(self.ranks.context, world_size, at)
        shared.holds.value = holds
        sections = {
            "parallel": layout(tp=world_size),
            "training": {**TRAINING, "async_save": asynchronous, "save": save},
        }
        plan = (workdir, self.target, sections, shared)
        return shared, self.ranks.start(world_size, workdir, run_rank, *plan, torchrun=torchrun)

    def interrupted(self, workdir: Path, moment: Moment) -> bool:
        """Runs a job until the moment, lets it happen, and waits until nothing of the job is left.

        Whether it came to it.
        """
        shared, children = self.start(
            workdir,
            moment.world_size,
            moment.asynchronous,
            moment.at,
            holds=not moment.delay,
            torchrun=moment.torchrun,
        )
        wait_until_reached(shared, children)
        time.sleep(moment.delay)
        phase = PHASES[shared.phase.value]
        happens = shared.reached and any(child.is_alive() for child in children)
        if happens:
            _act(moment, shared, children)
        shared.release()
        codes = self.ranks.wait(children)
        self.ranks.wait_for_nothing_left()
        if not happens or moment.kind == Kind.STOP:
            assert not any(codes), (codes, outputs(workdir))
        elif moment.kind == Kind.RANK_OF_TORCHRUN:
            # It may have ended before the signal came
            assert codes == [1] or codes == [0], (codes, outputs(workdir))
        elif happens:
            # 1: a rank that lost the other, before it was killed as well
            assert set(codes) <= ({0, 1, -signal.SIGKILL} if -signal.SIGKILL in codes else {0}), (
                codes,
                outputs(workdir),
            )
        if happens:
            self.counts[moment.kind, phase] += 1
        return happens


def wait_until_reached(shared: Watched, children: list[Any]) -> None:
    while not shared.reached and any(child.is_alive() for child in children):
        time.sleep(0.003)


def _act(moment: Moment, shared: Watched, children: list[Any]) -> None:
    victim = shared.pids[moment.victim] or children[0].pid
    match moment.kind:
        case Kind.RANK | Kind.RANK_OF_TORCHRUN:
            _send(victim, signal.SIGKILL)
        case Kind.TORCHRUN:
            _send(children[0].pid, signal.SIGKILL)
        case Kind.GROUP:
            for child in children:
                _send(-child.pid, signal.SIGKILL)
        case Kind.STOP:
            _send(victim, signal.SIGSTOP)
            shared.release()  # the others go on
            time.sleep(0.3)
            _send(victim, signal.SIGCONT)


def _send(process: int, number: int) -> None:
    """process: negative for a group, as of kill(2)."""
    try:
        os.kill(process, number)
    except ProcessLookupError:  # it has just ended, or is not yet a leader of its group
        if process < 0:
            _send(-process, number)


def outputs(workdir: Path) -> list[str]:
    return [path.read_text()[-2000:] for path in sorted(workdir.glob("output-*.txt"))]
