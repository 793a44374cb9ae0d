"""Reads a tensor in the form of torch.save as a view of the memory where it lies. torch.load would copy it
into new memory."""

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from megatron_fuse.errors import UserError
from megatron_fuse.training.safe_unpickling import read_plain

_STORED_TYPES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}


def read_tensor(content: memoryview, place: str) -> torch.Tensor:
    """The tensor that torch.save wrote. A plain tensor is a view of `content`, which saves two copies; any
    other is a copy.

    place: the file, for the error. Raises UserError if the content is no tensor.
    """
    try:
        return _view_tensor(content)
    except Exception:  # another kind of tensor, or damage: torch knows
        tensor = read_plain(bytes(content), place)
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{place} is a {type(tensor).__name__}, not a tensor. Name another checkpoint.")
    return tensor


class _TensorUnpickler(pickle._Unpickler):
    """Reads the pickle of one tensor. The numbers of the tensor are in other records of the file.

    It is pickle's implementation in Python. The one in C keeps its objects in a list, and the pickle states
    their places: one damaged byte can make that list take tens of gigabytes.
    """

    def __init__(self, content: bytes, numbers: Callable[[str], memoryview]) -> None:
        super().__init__(io.BytesIO(content))
        self.numbers = numbers

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *_: torch.as_strided(flat, size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORED_TYPES:
            return _STORED_TYPES[name]
        raise ValueError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, record, _, count = pid
        return torch.frombuffer(self.numbers(record), dtype=dtype, count=count)


def _view_tensor(content: memoryview) -> torch.Tensor:
    with zipfile.ZipFile(_Reading(content)) as archive:
        records = {one.filename.partition("/")[2]: one for one in archive.infolist()}

    def record(name: str) -> memoryview:
        one = records[name]
        if one.compress_type != zipfile.ZIP_STORED:
            raise ValueError("compressed")
        name_length, extra_length = struct.unpack_from("<HH", content, one.header_offset + 26)
        start = one.header_offset + 30 + name_length + extra_length
        return content[start : start + one.file_size]

    if bytes(record("byteorder")).decode() != sys.byteorder:
        raise ValueError("other byte order")
    tensor = _TensorUnpickler(bytes(record("data.pkl")), lambda key: record(f"data/{key}")).load()
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"a {type(tensor).__name__}")
    return tensor


class _Reading(io.RawIOBase):
    """A file object over a buffer, which is not copied."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: len(self.content)}[whence]
        return self.at

    def readinto(self, into: Any) -> int:
        part = self.content[self.at : self.at + len(into)]
        into[: len(part)] = part
        self.at += len(part)
        return len(part)
