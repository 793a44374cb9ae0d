"""Runs checks one after another, each in its own process, so that a crash loses no results of others.

On a GPU every process is started fresh, because CUDA does not work in a fork of a process that has used it.
On a CPU it is a fork of this process, which has imported the large libraries already.
"""

import importlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.fork_server import LIBRARIES
from megatron_fuse.gpu_checks.catalogue import MINUTES, Check
from megatron_fuse.gpu_checks.report import markdown
from megatron_fuse.gpu_checks.rows import Row, failed, not_run
from megatron_fuse.logs import start_logging
from megatron_fuse.processes import end_with_pool
from megatron_fuse.text_safety import brief

logger = logging.getLogger(__name__)

JSON_LINES, TABLE = "checks.jsonl", "checks.md"
NO_TIME = "no time left"
# Nothing is downloaded, and the collectives of one machine use no network. Torch looks for a GPU without
# initialising CUDA.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def run_checks(checks: Sequence[Check], *, device: str, minutes: float, output: Path) -> list[Row]:
    """Runs the checks and returns all rows, in order. Writes each row to OUTPUT/checks.jsonl when it arrives.

    At the end the table is written to OUTPUT/checks.md. minutes: of all checks together. A check for which no
    time is left gives one row that says so. If there are more than MINUTES, the limit of each check grows in
    proportion, for slow machines. If a check crashes or takes too long, its rows so far are kept, and a
    failed row is added.

    Raises UserError if `output` is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--out {output} already exists and is not empty. Name an empty or a new directory.")
    output.mkdir(parents=True, exist_ok=True)
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    context = process_context(device)
    end = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    try:
        with (output / JSON_LINES).open("w", encoding="utf-8") as file:
            for check in checks:
                logger.info(f"{check.name} ...")
                check = replace(check, seconds=check.seconds * max(minutes / MINUTES, 1))
                for row in rows_of(check, device, output / check.name, context, left=end - time.monotonic()):
                    rows.append(row)
                    file.write(row.json() + "\n")
                    file.flush()
    finally:
        (output / TABLE).write_text(markdown(rows), encoding="utf-8")
    return rows


def process_context(device: str) -> SpawnContext | ForkContext:
    """The way to start processes. For the CPU it imports the libraries here, so that every fork has them."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    for name in LIBRARIES:
        importlib.import_module(name)
    return multiprocessing.get_context("fork")


def rows_of(
    check: Check, device: str, directory: Path, context: SpawnContext | ForkContext, *, left: float
) -> Iterator[Row]:
    """Yields the rows of a check as they arrive.

    left: most seconds that it may take, beside its own limit.
    """
    if left <= 0:
        yield replace(not_run("all of it", NO_TIME), check=check.name)
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    log = directory.with_suffix(".log")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(check, device, directory, log, writer))
    process.start()
    writer.close()
    limit = min(check.seconds, left)
    try:
        complete = yield from _received(reader, process, time.monotonic() + limit)
    finally:
        _end(process)
    problem = None
    if not complete and left < check.seconds:
        problem = not_run("the rest of it", f"{NO_TIME} after {limit:.0f} s")
    elif not complete:
        problem = failed("the rest of it", f"took more than {limit:.0f} s; it has written {log}")
    elif process.exitcode:
        problem = failed(
            "the rest of it", f"{_ending(process.exitcode)}: {_last_line(log)}; it has written {log}"
        )
    if problem:
        yield replace(problem, check=check.name)


def _received(reader: Connection, process: BaseProcess, until: float) -> Generator[Row, None, bool]:
    """Yields the rows that a process sends until it ends. Returns whether it ended in time.

    until: time.monotonic().
    """
    while True:
        if reader in wait([reader, process.sentinel], max(until - time.monotonic(), 0)):
            try:
                yield reader.recv()
            except EOFError:
                break
        elif not process.is_alive():
            return True
        elif time.monotonic() >= until:
            return False
    process.join(max(until - time.monotonic(), 0))
    return not process.is_alive()


def _end(process: BaseProcess) -> None:
    """Kills a process and all processes that it has started."""
    if process.pid is not None:
        # The group has no process left, or the process has not called setsid yet.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _run(check: Check, device: str, directory: Path, log: Path, writer: Connection) -> None:
    """The main function of a check's process.

    It begins a process group, so that _end also kills what it starts.
    """
    os.setsid()
    end_with_pool()
    output = log.open("a", buffering=1, encoding="utf-8")
    for descriptor in (1, 2):  # also for output of libraries and of processes that the check starts
        os.dup2(output.fileno(), descriptor)
    sys.stdout = sys.stderr = output
    start_logging()  # a spawned process has no handler of its parent
    for row in importlib.import_module(check.module).run(device, directory):
        writer.send(replace(row, check=check.name))


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    """The last line that a process has written. If it is the last line of a traceback, it names the error."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return brief(lines[-1]) if lines else "without a word"
