"""A GPU for tests on a machine without one: a device "pretend", whose tensors compute on the CPU.

Within `pretend_device()` every factory and every `.to` that names the device makes such a tensor. As on a
GPU, an operation on tensors of both devices is refused, and so is `.numpy()`. Values are those of the CPU.
The choice of kernels cannot be had this way.

torch keeps the device for the rest of the process's life, and then treats other tensors otherwise too: only
for processes of their own (the fixture `apart`).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

_NAME = "pretend"
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# As a mode sees them, also where Megatron's process has others in their place (runtime/cpu.py).
_FROM_DATA = tuple(getattr(function, "__wrapped__", function) for function in (torch.tensor, torch.as_tensor))
# What may have tensors of both devices: copies, and indexing by index tensors of the CPU.
_BETWEEN_DEVICES = {
    _aten.copy_,
    _aten._to_copy,
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten._has_compatible_shallow_copy_type,
}


class MixedDevices(RuntimeError):
    """An operation had tensors of both devices."""


class PretendTensor(torch.Tensor):
    """values: the CPU tensor that holds what is in it."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(_NAME, 0),
            requires_grad=values.requires_grad,
        )
        made.values = values
        return made

    def __repr__(self) -> str:
        return f"PretendTensor({self.values!r})"

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return _dispatch(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class _DeviceIsThere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return _dispatch(func, args, kwargs or {})


class _TensorsFromData(TorchFunctionMode):
    """torch.tensor, and an index that is a list, make tensors where no dispatch mode sees it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1], dtype=None if args[1] else torch.long), *args[2:])
        device = kwargs.pop("device", None) if func in _FROM_DATA else None
        found = func(*args, **kwargs)
        return found if device is None else found.to(device)


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
    there = [isinstance(tensor, PretendTensor) for tensor in tensors]
    # A number in a tensor of the CPU goes with every device.
    if any(there) and func.overloadpacket not in _BETWEEN_DEVICES:
        others = [
            tensor for tensor, is_there in zip(tensors, there, strict=True) if not is_there and tensor.dim()
        ]
        if others:
            raise MixedDevices(
                f"{func} has tensors of the device and of the CPU: {[list(o.shape) for o in others]}"
            )
    named = [value for value in leaves if isinstance(value, torch.device)]
    result_is_there = named[0].type == _NAME if named else any(there)
    if func.overloadpacket is _aten.copy_:
        result_is_there = there[0]
    values = tree_map_only(PretendTensor, lambda tensor: tensor.values, (args, kwargs))
    values, named_values = tree_map_only(torch.device, lambda d: _CPU if d.type == _NAME else d, values)
    found = func(*values, **named_values)
    if not result_is_there:
        return found
    own = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}
    # What an operation in place returns is its argument. Views share memory, as their values do.
    return tree_map_only(
        torch.Tensor, lambda value: own[id(value)] if id(value) in own else PretendTensor(value), found
    )


@functools.cache
def _register() -> torch.device:
    backend_registration._setup_privateuseone_for_python_backend(_NAME)
    return torch.device(_NAME, 0)


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The device, on which tensors can be made, and to which they can be moved, within the block."""
    device = _register()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    # A parameter's data cannot become another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _DeviceIsThere(), _TensorsFromData():
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
