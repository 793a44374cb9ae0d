"""Ranks in processes that can be killed, as `kill -9` does it, while the test run goes on."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rank_pool import _free_port


class KillableRanks:
    """Children come from a server that has imported everything, and lead a process group each, so that writers that outlive
    their rank can be ended with it at last."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["megatron_fuse.training.trainer", "transformers", "test_layouts"])
        self.children: list[Any] = []

    def run(self, world_size: int, workdir: Path, function: Callable, *arguments: Any, hangs_after: float = 60) -> bool:
        """function(rank, *arguments) on every rank, which prints to WORKDIR/output-RANK.txt. Whether one was killed.

        The others are killed then, as torchrun does it; a rank that fails otherwise fails the test. hangs_after: seconds without
        the end of any rank.
        """
        port = _free_port()
        workdir.mkdir(exist_ok=True)
        children = [
            self.context.Process(target=_run_rank, args=(rank, world_size, port, workdir, function, *arguments))
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        self.children += children
        killed = False
        while running := [child for child in children if child.is_alive()]:
            assert multiprocessing.connection.wait([child.sentinel for child in running], timeout=hangs_after), "hangs"
            if any(child.exitcode for child in children):
                killed = any(child.exitcode == -signal.SIGKILL for child in children)
                assert killed, [path.read_text() for path in workdir.glob("output-*.txt")]
                for child in running:
                    child.kill()
        return killed

    def end_writers(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        self.children.clear()

    def close(self) -> None:
        self.end_writers()


def _run_rank(rank: int, world_size: int, port: int, workdir: Path, function: Callable, *arguments: Any) -> None:
    os.setsid()
    with (workdir / f"output-{rank}.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    if world_size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ |= dict(zip(names, map(str, (rank, rank, world_size, "127.0.0.1", port)), strict=True))
    function(rank, *arguments)
