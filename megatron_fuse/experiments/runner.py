"""Makes the missing runs of an experiment, several side by side."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.experiment import Experiment, require_tables, scenario_and_name
from megatron_fuse.experiments.fork_server import Commands
from megatron_fuse.experiments.layers import data_directory, with_places
from megatron_fuse.experiments.records import Owner, read_record
from megatron_fuse.experiments.results import collect_results, measured_runs
from megatron_fuse.experiments.runs import Run, code_version, command_words, make
from megatron_fuse.processes import run_tied
from megatron_fuse.progress import Progress
from megatron_fuse.storage import write_json

logger = logging.getLogger(__name__)

_MOST_JOBS = 1024
_PATIENCE = 5.0  # seconds in which a command must end at an interrupt, before a second one kills it


def run_experiment(
    experiment: Experiment,
    path: Path,
    *,
    tables: Sequence[str] = (),
    split: str | None = None,
    jobs: int = 2,
    skip_measured: bool = False,
) -> list[str]:
    """Makes the runs of these tables (default: the first table) and measures them.

    Returns one message per failed run.

    path: the experiment's file; the workdir records it. jobs: number of runs side by side, one thread each.
    skip_measured: do not make the runs of results.measured_runs.

    Raises UserError if another experiment or process uses the workdir, or if the workdir holds finished runs
    that must not be compared with new ones (results.py).
    """
    if not 1 <= jobs <= _MOST_JOBS:
        raise UserError(f"--jobs must be from 1 to {_MOST_JOBS}, not {jobs}")
    split, version = split or experiment.split, code_version()
    names = experiment.needed(require_tables(experiment, list(tables)))
    with _only_one(experiment.workdir, path) as lock:
        collect_results(experiment, split)  # raises now the error that it would raise after hours of work
        scenarios = dict.fromkeys(scenario_and_name(name)[0] for name in names)
        commands = [experiment.prepare] if experiment.prepare else []
        for prepare in dict.fromkeys(
            with_places(command, seed, scenario)
            for command in commands
            for scenario in scenarios
            for seed in experiment.seeds
        ):
            logger.info(f"$ {prepare}")
            if code := run_tied(command_words(prepare)):
                raise UserError(
                    f"the command `prepare` ended with exit code {code}. Fix the error above and run the "
                    "experiment again."
                )
        # Variant by variant: the first runs then have different seeds, and make the data of their seeds side
        # by side.
        runs = [Run(experiment, name, seed) for name in names for seed in experiment.seeds]
        todo = [run for run in runs if not run.is_finished(split)]
        if skip_measured:
            measured = measured_runs(experiment, split)
            wanted = {each for run in todo if run not in measured for each in (run, *run.parts)}
            todo = [run for run in todo if run in wanted]
        already = len(runs) - len(todo)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
        with ExitStack() as stack:
            # The processes that they start hold the lock too: if this process is killed, they may go on for a
            # while.
            starters = [
                stack.enter_context(Commands(Path.cwd(), environment, keep_open=[lock])) for _ in range(jobs)
            ]
            with Progress(experiment.workdir, "runs", len(runs), already=already) as progress:
                return _run_all(todo, split, starters, version, progress)


def _interrupt_all(starters: Sequence[Commands]) -> None:
    for commands in starters:
        commands.interrupt()


def _run_all(
    todo: list[Run], split: str, starters: list[Commands], version: str, progress: Progress
) -> list[str]:
    """Makes the runs in their order, except that a merge waits for its parts.

    If a part failed, the merge fails too. Returns one message per failed run.
    """
    locks = {data_directory(run.experiment, run.name, run.seed): Lock() for run in todo}
    total, failed, running = len(todo), dict[Run, str](), dict[Future, tuple[Run, float]]()
    jobs, idle = len(starters), list(starters)

    def make_with_an_idle_one(run: Run) -> None:
        commands = idle.pop()  # never empty: there are as many as threads
        try:
            make(run, commands, locks[data_directory(run.experiment, run.name, run.seed)], split, version)
        finally:
            idle.append(commands)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            while todo or running:
                open_runs = {*todo, *(run for run, _ in running.values())}
                for run in [run for run in todo if not open_runs & set(_parts(run))][: jobs - len(running)]:
                    todo.remove(run)
                    lost = [part.name for part in _parts(run) if part in failed]
                    if lost:
                        failed[run] = f"{run.name}, seed {run.seed}: not merged, as {', '.join(lost)} failed"
                        logger.error(failed[run])
                        continue
                    running[pool.submit(make_with_an_idle_one, run)] = run, time.perf_counter()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, start = running.pop(future)
                    took = f"{time.perf_counter() - start:.0f} s"
                    if error := future.exception():
                        if not isinstance(error, UserError):
                            raise error
                        failed[run] = str(error)
                        logger.error(f"FAILED after {took}: {error}")
                        continue
                    logger.info(f"{run.name}, seed {run.seed}: {took}")
                    progress.update(total - len(todo) - len(running) - len(failed))
        except BaseException:
            # Without the interrupts, the exit of the pool would wait for the commands to finish, perhaps for
            # hours.
            pool.shutdown(wait=False, cancel_futures=True)
            _interrupt_all(starters)
            while wait(running, timeout=_PATIENCE).not_done:
                _interrupt_all(starters)
            raise
    return list(failed.values())


def _parts(run: Run) -> list[Run]:
    """The variants that a merge waits for. Models are there already."""
    return [part for part in run.parts if part.row in run.experiment.variants]


@contextmanager
def _only_one(workdir: Path, path: Path) -> Iterator[int]:
    """Holds the lock of a workdir, and yields the lock's file descriptor.

    A workdir belongs to one experiment file. At any time, only one process and the processes that it started
    may use it. Raises UserError if another experiment or process does.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    owner, name = workdir / "experiment.json", os.path.relpath(path.resolve())
    if owner.exists() and (theirs := read_record(Owner, owner).experiment) != name:
        raise UserError(
            f"{workdir} belongs to the experiment {theirs}, not to {name}. Set another workdir for this "
            "experiment."
        )
    with (workdir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{workdir}: another process, or a command that it started, runs this experiment. Wait until "
                "it ends, or stop it."
            ) from error
        write_json(owner, {"experiment": name})
        yield lock.fileno()
