"""A GPU without values: Megatron's "cuda" is torch's "meta" device, so that a whole training step runs in
shapes alone.

A tensor that is made on the CPU in the place of the GPU meets tensors of "meta" in the step, which is
refused; whatever asks for a value, as `.item()` does, fails. So a step that passes leaves nothing on the CPU
and does not wait for the GPU.
"""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist

META = torch.device("meta")
_COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast")

# Names that Megatron's gradient buffer has given two of them.
_ALIASES = {
    "dist_reduce_scatter_func": "reduce_scatter_tensor",
    "dist_all_gather_func": "all_gather_into_tensor",
}


class _Done:
    """A collective that has ended."""

    def wait(self, *_: object) -> bool:
        return True


def _of_one_rank(collective):  # type: ignore[no-untyped-def]
    """gloo knows no tensors of "meta"; alone, a rank has nobody to talk to."""

    def without_values(*arguments, **named):  # type: ignore[no-untyped-def]
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        if any(tensor.device == META for tensor in tensors):
            return _Done()
        return collective(*arguments, **named)

    return without_values


@contextlib.contextmanager
def _coalescing(*_: object, **__: object) -> Iterator[_Done]:
    yield _Done()


@contextlib.contextmanager
def meta_in_place_of_cuda() -> Iterator[None]:
    """For a process with a runtime of one rank on the CPU (start_runtime)."""
    from megatron.core.distributed import param_and_grad_buffer

    from megatron_fuse.runtime import cpu

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(cpu, "CPU", META))  # what "cuda" means
        for name in _COLLECTIVES:
            stack.enter_context(patch.object(dist, name, _of_one_rank(getattr(dist, name))))
        for alias, name in _ALIASES.items():
            stack.enter_context(patch.object(param_and_grad_buffer, alias, getattr(dist, name)))
        stack.enter_context(patch.object(param_and_grad_buffer, "_coalescing_manager", _coalescing))
        stack.enter_context(patch.object(torch.Tensor, "type", _type_of(torch.Tensor.type)))
        yield


def _type_of(type_of):  # type: ignore[no-untyped-def]
    """Tensor.type, which gives a tensor without values the name that one on a GPU has."""

    def call(tensor, *arguments, **named):  # type: ignore[no-untyped-def]
        if arguments or named:
            return type_of(tensor, *arguments, **named)
        return f"torch.cuda.{_TYPES[tensor.dtype]}"

    return call


_TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor"}
