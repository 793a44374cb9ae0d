"""A pool of ranks, started once per test run, from a server that has imported the large libraries once for
all of them.

In a module of its own, since the workers import it by name, and `conftest` is the name of several files.
"""

import gc
import multiprocessing.forkserver
import os
import queue
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.multiprocessing  # noqa: F401  (for tensors between processes)
from ports import free_port

MOST_RANKS = 4
# Those of a few runtimes, each of which has about 20. A run that ends with an error may keep its own until
# the next run.
MOST_THREADS_LEFT = 100
# New objects between two garbage collections; collections of a generation between two of the next.
COLLECTED = (20_000, 20, 10)
# What a rank imports, for ten seconds of its processor's time.
LIBRARIES = [
    "megatron_fuse.training.trainer",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.launcher.api",
]
# Environment of a process whose tests run on the CPU; Triton's kernels are interpreted there.
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


def forked() -> ForkServerContext:
    """Where processes come from that have LIBRARIES at once, without a GPU: forks of one server, which
    ends with the test run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with patch.dict(os.environ, WITHOUT_GPU):
        multiprocessing.forkserver.ensure_running()
    return context


def _next_task(tasks: Any) -> Any:
    """Waits for work; None at the end, or when the test run has died."""
    while True:
        try:
            return tasks.get(timeout=5)
        except queue.Empty:
            parent = multiprocessing.parent_process()
            if parent is None or not parent.is_alive():
                return None


def _serve(tasks: Any, results: Any) -> None:
    """A worker: for each task it becomes one rank of a world, calls the function, and leaves the world
    again.
    """
    import torch

    # Else Megatron, which collects garbage at every save, looks through all imported modules each time.
    gc.freeze()
    gc.set_threshold(*COLLECTED)
    torch.set_num_threads(1)
    while (task := _next_task(tasks)) is not None:
        rank, world_size, port, function, arguments = task
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            value = function(*arguments)
            _leave_world()
            if (left := threads_of_gloo()) > MOST_THREADS_LEFT:
                raise RuntimeError(f"{left} threads of gloo are left by this test and those before it here")
            results.put((rank, value, None))
        except BaseException:
            # First, because the end of a runtime may wait for the other ranks.
            results.put((rank, None, traceback.format_exc()))
            _leave_world()
        # An exception among the arguments keeps the frames of the run that raised it.
        del task, function, arguments


def _leave_world() -> None:
    from megatron_fuse.runtime import stop_runtime

    stop_runtime()
    # Else the cycles among Megatron's objects keep process groups.
    gc.collect()


def threads_of_gloo() -> int:
    """The threads of this process's groups. Each wakes up a hundred times a second."""
    count = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # the thread has ended
            count += path.read_text().startswith("gloo")
    return count


class RankPool:
    """ranks(world_size, function, *arguments) -> the function's result on every rank, in order of rank.

    function is a module-level function; it calls `megatron_fuse.runtime.start_runtime`, or torch.distributed
    itself.
    """

    def __init__(self) -> None:
        context = forked()
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(MOST_RANKS)]
        self.workers = [
            context.Process(target=_serve, args=(t, self.results), daemon=False) for t in self.tasks
        ]
        for worker in self.workers:
            worker.start()

    def __call__(
        self, world_size: int, function: Callable, *arguments: Any, timeout: float = 600
    ) -> list[Any]:
        port = free_port()
        for rank in range(world_size):
            self.tasks[rank].put((rank, world_size, port, function, arguments))
        answers: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(answers) < world_size:
            try:
                rank, value, error = self.results.get(timeout=5)
            except queue.Empty:
                ended = {rank: worker.exitcode for rank, worker in enumerate(self.workers)}
                ended = {rank: code for rank, code in ended.items() if code is not None}
                if not ended and time.monotonic() < end:
                    continue
                self._begin_again()
                if ended:
                    pytest.fail(f"ranks ended, with these exit codes: {ended}", pytrace=False)
                missing = set(range(world_size)) - set(answers)
                pytest.fail(f"ranks {missing} gave no answer in {timeout} s", pytrace=False)
            if error:
                self._begin_again()
                pytest.fail(f"rank {rank} of {world_size}:\n{error}", pytrace=False)
            answers[rank] = value
        return [answers[rank] for rank in range(world_size)]

    def _begin_again(self) -> None:
        """The other ranks may hang in their collectives: only a new pool is clean."""
        self.close()
        self.__init__()  # type: ignore[misc]

    def close(self) -> None:
        # Told to end, a worker takes the process along that collects the results of Megatron's checkpoint
        # writers.
        for tasks in self.tasks:
            tasks.put(None)
        for worker in self.workers:
            worker.join(timeout=5)
            worker.kill()
            worker.join()
