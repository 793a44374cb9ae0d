"""Measures time and memory on a device."""

import gc
import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_in_turns(device: str, repeats: int, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each work. All works run in turns, after a first turn that does not count.

    So if the machine is slow for some time, this affects all works in the same way. repeats: number of
    counted turns.
    """
    turns = []
    for _ in range(1 + repeats):
        turns.append([_seconds(device, work) for work in works])
    return [statistics.median(of_one) for of_one in zip(*turns[1:], strict=True)]


def _seconds(device: str, work: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of the GPU that torch's allocator held during the work."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def free_memory(device: str) -> None:
    """Returns the memory of dead objects to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
