"""The most bytes that tensors of a CPU hold during a piece of work."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def live_bytes() -> int:
    """Bytes of the storages of all tensors that exist."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # isinstance would ask for the class of lazy modules, which imports them.
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes_of(work: Callable[[], object]) -> int:
    """The largest sum of what the allocator gave and got back while the work ran, by its own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
