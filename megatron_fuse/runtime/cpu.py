"""Lets Megatron-core run on a machine without CUDA. With CUDA this file changes nothing.

Megatron-core asks torch.cuda for its device, its streams and its random state, passes `device="cuda"` to
factories and compares `tensor.type()` with "torch.cuda.FloatTensor". `enable_cpu_megatron` replaces these by
the CPU's, for the whole process.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


class _NoStream:
    """The only stream of a CPU. Its methods do nothing, as there is nothing to wait for."""

    def wait_stream(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def record_event(self, *_: object) -> "_NoStream":
        return self  # an event: there is nothing to wait for either

    def synchronize(self) -> None: ...


def _names_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


# Functions that make a tensor on the device that their keyword `device` names.
_FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_permuted", "empty_strided", "eye"),
    *("full", "full_like", "linspace", "logspace", "normal", "ones", "ones_like", "rand", "rand_like"),
    *("randint", "randint_like", "randn", "randn_like", "randperm", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros", "zeros_like"),
)
_FACTORIES_OF_TENSORS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for which a CUDA device is the CPU. Its other arguments keep their places."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if "device" in named and _names_cuda(named["device"]):
            named["device"] = CPU
        return function(*arguments, **named)

    return call


def _moving_to_cpu(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.to, for which a CUDA device is the CPU, also without its keyword."""

    @functools.wraps(to)
    def call(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return to(tensor, *(CPU if _names_cuda(each) else each for each in arguments), **named)

    return call


def _with_cuda_type(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type, which calls a CPU tensor's type a CUDA type.

    Megatron's optimizers sort parameters by the string "torch.cuda.<dtype>Tensor".
    """

    @functools.wraps(type_of)
    def call(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        found = type_of(tensor, *arguments, **named)
        if arguments or named or found.startswith("torch.cuda."):  # torch calls it twice within a mode
            return found
        return found.replace("torch.", "torch.cuda.", 1)

    return call


def _redirect_cuda_to_cpu() -> None:
    """Replaces the functions of torch to which Megatron gives a CUDA device.

    A torch function mode would redirect all functions in fewer lines. But it is called for every function of
    torch. That is a fifth of the time of a small model's training.
    """
    from torch.jit._builtins import _find_builtin, _register_builtin
    from torch.utils._device import _device_constructors

    # `with torch.device(...)` compares with this list, which torch makes at its first use and then keeps. It
    # must have torch's own functions, as the functions below call them.
    _device_constructors()
    tensor: Any = torch.Tensor
    for owner, names in ((torch, _FACTORIES), (tensor, _FACTORIES_OF_TENSORS)):
        for name in names:
            function = getattr(owner, name)
            redirected = _on_cpu(function)
            setattr(owner, name, redirected)
            if operator := _find_builtin(function):  # for torch.jit.script
                _register_builtin(redirected, operator)
    tensor.to = _on_cpu(_moving_to_cpu(tensor.to))
    tensor.type = _with_cuda_type(tensor.type)
    tensor.cuda = lambda self, *_, **__: self


def _clip_by_total_norm(parameters, max_norm, total_norm, use_decoupled_grad=False) -> None:
    """Megatron's gradient clipping, without its assertion that gradients are CUDA tensors."""
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient >= 1.0:
        return
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    for parameter in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
        gradient = getattr(parameter, name, None)
        if gradient is not None:
            gradient.mul_(coefficient)


def _numbers_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's maybe_move_tensor_to_cpu, which returns a tensor that lies on the CPU already as it is, even
    if the caller asks for numpy.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gathering(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron's gather along the first dimension, also for parts of different lengths."""

    def gather(part: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False):
        if output_split_sizes is None or group.size() == 1:
            return even(part, group, use_global_buffer=use_global_buffer)
        lengths = [int(length) for length in output_split_sizes]
        whole = even(_lengthened(part, max(lengths)), group)
        return torch.cat([each[:n] for each, n in zip(whole.split(max(lengths)), lengths, strict=True)])

    return gather


def _reducing(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron's reduce-scatter along the first dimension, also for parts of different lengths."""

    def reduce(whole: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False):
        if input_split_sizes is None or group.size() == 1:
            return even(whole, group, use_global_buffer=use_global_buffer)
        lengths = [int(length) for length in input_split_sizes]
        parts = [_lengthened(part, max(lengths)) for part in whole.split(lengths)]
        return even(torch.cat(parts), group)[: lengths[group.rank()]]

    return reduce


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    """The tensor with rows of zeros at its end."""
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


@functools.cache
def enable_cpu_megatron() -> bool:
    """Prepares this process for Megatron-core without CUDA.

    If CUDA is present it changes nothing and returns False.
    """
    if torch.cuda.is_available():
        return False
    stream = _NoStream()
    cuda: Any = torch.cuda  # Any: the functions that replace those of torch.cuda have other types
    # A function object of its own for each name: torch.compile's table of known functions refuses an object
    # with two names.
    cuda.current_device = lambda: CPU
    cuda.current_stream = lambda *_, **__: stream
    cuda.default_stream = lambda *_, **__: stream
    cuda.Stream = _NoStream
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    cuda.synchronize = lambda *_, **__: None
    cuda.set_device = lambda *_, **__: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _redirect_cuda_to_cpu()

    import megatron.core.optimizer.optimizer as megatron_optimizer
    import megatron.core.tensor_parallel.mappings as megatron_mappings
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as megatron_dispatcher

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_mappings._gather_along_first_dim = _gathering(megatron_mappings._gather_along_first_dim)
    megatron_mappings._reduce_scatter_along_first_dim = _reducing(
        megatron_mappings._reduce_scatter_along_first_dim
    )
    megatron_dispatcher.maybe_move_tensor_to_cpu = _numbers_on_cpu
    megatron_optimizer.clip_grad_by_total_norm_fp32 = _clip_by_total_norm
    return True
