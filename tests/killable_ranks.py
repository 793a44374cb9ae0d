"""Ranks in processes that can be killed, as `kill -9` does it, while the test run goes on."""

import contextlib
import gc
import multiprocessing.connection
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from ports import free_port
from rank_pool import forked

from megatron_fuse.errors import exit_code
from megatron_fuse.processes import end_with

# Seconds for a whole job to end after a part of it has, on a busy machine; torchrun's own patience is 30.
ENDS_WITHIN = 120


def run_module(rank: int, words: list[str]) -> None:
    """`python -m` as a rank: words are the module and its arguments."""
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class KillableRanks:
    """Jobs of ranks that come from the server that has imported everything.

    A rank leads a session, and torchrun one with all its ranks, so that what outlives them can be found.
    """

    def __init__(self) -> None:
        self.context = forked()
        self.sessions: list[int] = []  # of all jobs; a session's number is its leader's process id

    def run(
        self, world_size: int, workdir: Path, function: Callable, *arguments: Any, **options: Any
    ) -> list[int]:
        """start and wait."""
        return self.wait(self.start(world_size, workdir, function, *arguments), **options)

    def start(
        self, world_size: int, workdir: Path, function: Callable, *arguments: Any, torchrun: bool = False
    ) -> list[Any]:
        """function(rank, *arguments) on every rank, which prints to WORKDIR/output-RANK.txt. Returns a
        process for each rank.

        A UserError ends a rank with exit code 2. torchrun: under torch's own agent, whose process is then the
        only one returned.
        """
        port = free_port()
        workdir.mkdir(exist_ok=True)
        if torchrun:
            plans = [(_run_torchrun, (world_size, port, workdir, function, *arguments))]
        else:
            plans = [
                (_run_rank, (rank, world_size, port, workdir, function, *arguments))
                for rank in range(world_size)
            ]
        children = [self.context.Process(target=target, args=args) for target, args in plans]
        for child in children:
            child.start()
        self.sessions += [child.pid for child in children]
        return children

    def wait(self, children: list[Any], *, hangs_after: float = 900) -> list[int]:
        """Their exit codes. If one was killed, the others are killed too, as torchrun does it; any other end
        is waited for.

        hangs_after: seconds without the end of any.
        """
        while running := [child for child in children if child.is_alive()]:
            assert multiprocessing.connection.wait(
                [child.sentinel for child in running], timeout=hangs_after
            ), "hangs"
            if any(child.exitcode == -signal.SIGKILL for child in children):
                for child in running:
                    child.kill()
        return [child.exitcode for child in children]

    def left_over(self) -> list[psutil.Process]:
        """Processes of ended or running jobs that are still there."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(pid) in self.sessions and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(psutil.Process(pid))
        return found

    def wait_for_nothing_left(self) -> float:
        """Seconds until every process of every job has ended by itself; fails where one goes on."""
        began = time.monotonic()
        while left := self.left_over():
            assert time.monotonic() - began < ENDS_WITHIN, [process.cmdline() for process in left]
            time.sleep(0.1)
        self.sessions.clear()
        return time.monotonic() - began

    def close(self) -> None:
        for process in self.left_over():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.sessions.clear()


def _run_rank(
    rank: int, world_size: int, port: int, workdir: Path, function: Callable, *arguments: Any
) -> None:
    end_with(os.getppid())  # the server, which ends with the test run
    os.setsid()
    if world_size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ |= dict(zip(names, map(str, (rank, rank, world_size, "127.0.0.1", port)), strict=True))
    _become_rank(workdir, function, *arguments)


def _run_torchrun(world_size: int, port: int, workdir: Path, function: Callable, *arguments: Any) -> None:
    """torch's agent, which forks its ranks here instead of starting an interpreter for each."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    end_with(os.getppid())
    os.setsid()
    _print_to(workdir / "output-torchrun.txt")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id="killed",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    elastic_launch(config, _become_rank)(workdir, function, *arguments)


def _become_rank(workdir: Path, function: Callable, *arguments: Any) -> None:
    gc.freeze()  # as the ranks of rank_pool.py
    rank = int(os.environ.get("RANK", 0))
    _print_to(workdir / f"output-{rank}.txt")
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # If several ranks end at about the same time, the agent shows the error of one fork, which may not be
        # the first. torchrun starts its ranks as commands, and shows all errors.
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(workdir / f"output-error-{rank}.txt")
    torch.set_num_threads(1)
    if code := exit_code(partial(function, rank, *arguments)):
        sys.exit(code)


def _print_to(path: Path) -> None:
    with path.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
