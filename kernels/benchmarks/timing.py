"""Clock and memory of one call, on a GPU and on a CPU.

A call is forward and backward of the same inputs: its three marks give forward, backward and both. What has
no gradient is forward alone. Memory is taken in a call of its own, because asking for it takes time.
"""

import ctypes
import gc
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from inputs import Inputs
from providers import Provider


class CpuMeter:
    """The wall clock, and the resident set of this process (Linux)."""

    def flush(self) -> None:
        """Nothing: restoring the inputs has just gone through more memory than any cache holds."""

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, marks: Sequence[float]) -> list[float]:
        return [(stop - start) * 1e3 for start, stop in itertools.pairwise(marks)]

    def in_use(self) -> int:
        """Bytes held now; what was freed has gone back to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return self._resident("VmRSS")

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._resident("VmHWM")

    def _resident(self, field: str) -> int:
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)
        )
        return int(line.split()[1]) * 1024


class CudaMeter:
    """CUDA events on the current stream, and the caching allocator's count."""

    def __init__(self) -> None:
        self._l2 = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # several times any L2 cache

    def flush(self) -> None:
        """Fills the L2 cache with something else.

        Also keeps the device busy while the call's launches are queued.
        """
        self._l2.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in itertools.pairwise(marks)]

    def in_use(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


Meter = CpuMeter | CudaMeter


def call_times(meter: Meter, provider: Provider, inputs: Inputs) -> tuple[float, ...]:
    """Milliseconds in the order of the case's modes.

    `autograd.grad`, not `.backward()`: that would copy a gradient which lies over the logits into the leaf's
    own .grad, where a model hands it on to its output layer.
    """
    inputs.restore(provider.main_grad)
    meter.flush()
    marks = [meter.mark()]
    if inputs.forward_only:
        results = provider.loss(*inputs.arguments)
        marks.append(meter.mark())
        times = meter.milliseconds(marks)
        del results  # after the clock has stopped
        return tuple(times)
    loss = provider.loss(*inputs.arguments).sum()
    marks.append(meter.mark())
    gradients = torch.autograd.grad(loss, inputs.leaves)
    marks.append(meter.mark())
    forward, backward = meter.milliseconds(marks)
    del gradients  # after the clock has stopped
    return forward, backward, forward + backward


def call_peaks(meter: Meter, provider: Provider, inputs: Inputs) -> tuple[int, ...]:
    """Peak bytes above those held before the call, in the order of the case's modes; what forward keeps
    counts in backward too.

    The gradient of the logits or hidden states is part of it unless it is written over them. That of the
    weight is not, for no provider: training holds a main gradient anyway. (It flatters those whose peak comes
    before there is such a gradient.)
    """
    inputs.restore(provider.main_grad)
    before = meter.in_use()
    meter.reset_peak()
    if inputs.forward_only:
        provider.loss(*inputs.arguments)
        return (meter.peak() - before,)
    loss = provider.loss(*inputs.arguments).sum()
    forward = meter.peak() - before
    meter.reset_peak()
    gradients = torch.autograd.grad(loss, inputs.leaves)
    of_weight = sum(gradient.nbytes for gradient in gradients[1:] if not gradient.is_sparse)
    backward = max(meter.peak() - before - of_weight, 0)
    return forward, backward, max(forward, backward)


def copy_times(meter: Meter, device: str, size: int, repeats: int) -> list[float]:
    """Milliseconds of copying `size` bytes: what a kernel bound by memory can reach at best (read +
    written: 2 size).
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # its pages exist before the first copy
    times = []
    for _ in range(repeats):
        meter.flush()
        marks = [meter.mark()]
        target.copy_(source)
        marks.append(meter.mark())
        times += meter.milliseconds(marks)
    return times
