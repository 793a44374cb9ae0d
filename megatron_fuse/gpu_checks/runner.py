"""Runs checks one after another, each in a process of its own, which cannot take the others' results with it.

On a GPU every process is a fresh one: CUDA is not to be had in the fork of a process that has used it. On a CPU it is a fork of this
one, which has imported the large libraries already.
"""

import importlib
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
from megatron_fuse.processes import end_with_pool
from megatron_fuse.text_safety import brief, say

JSON_LINES, TABLE = "checks.jsonl", "checks.md"
NO_TIME = "no time left"
# Nothing is fetched, and the collectives of one machine need no network. Torch looks for a GPU without CUDA's own calls.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def run_checks(checks: Sequence[Check], *, device: str, minutes: float, output: Path) -> list[Row]:
    """All rows, in order. Each is written to OUTPUT/checks.jsonl as it comes; at the end OUTPUT/checks.md is the table.

    minutes: of all checks together; those for which no time is left are rows that say so. Of more than MINUTES each check has its
    share, as a slow machine needs. A check that crashes or takes too long
    keeps the rows that it had, and gets one that failed. output: UserError if anything is in it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--out {output}: something is there already: name a directory that is empty or not there")
    output.mkdir(parents=True, exist_ok=True)
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    context = process_context(device)
    end = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    try:
        with (output / JSON_LINES).open("w", encoding="utf-8") as file:
            for check in checks:
                say(f"{check.name} ...")
                check = replace(check, seconds=check.seconds * max(minutes / MINUTES, 1))
                for row in rows_of(check, device, output / check.name, context, left=end - time.monotonic()):
                    rows.append(row)
                    file.write(row.json() + "\n")
                    file.flush()
    finally:
        (output / TABLE).write_text(markdown(rows), encoding="utf-8")
    return rows


def process_context(device: str) -> SpawnContext | ForkContext:
    """How processes are started. For the CPU: imports what their forks will need."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    for name in LIBRARIES:
        importlib.import_module(name)
    return multiprocessing.get_context("fork")


def rows_of(
    check: Check, device: str, directory: Path, context: SpawnContext | ForkContext, *, left: float
) -> Iterator[Row]:
    """The rows of a check as they come. left: seconds that it may take, whatever its own limit."""
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
        problem = failed("the rest of it", f"{_ending(process.exitcode)}: {_last_line(log)}; it has written {log}")
    if problem:
        yield replace(problem, check=check.name)


def _received(reader: Connection, process: BaseProcess, until: float) -> Generator[Row, None, bool]:
    """The rows that a process sends until it ends; returns whether it has ended in time."""
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
    """The process with all that it has started."""
    if process.pid is not None:
        with suppress(ProcessLookupError):  # nothing of it is left, or it has not come to its setsid
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _run(check: Check, device: str, directory: Path, log: Path, writer: Connection) -> None:
    """The check's process: a group of its own, so that it can be ended with what it starts."""
    os.setsid()
    end_with_pool()
    output = log.open("a", buffering=1, encoding="utf-8")
    for descriptor in (1, 2):  # of libraries and of what the check starts
        os.dup2(output.fileno(), descriptor)
    sys.stdout = sys.stderr = output
    for row in importlib.import_module(check.module).run(device, directory):
        writer.send(replace(row, check=check.name))


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    """Of what a process has written: that of a traceback names the error."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return brief(lines[-1]) if lines else "without a word"
