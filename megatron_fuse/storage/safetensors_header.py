"""The header of a safetensors file: the names, dtypes and shapes of its tensors, and where their bytes lie.

    8 bytes n, little endian | n bytes of JSON {name: {dtype, shape, data_offsets}, "__metadata__": {text:
    text}} | data

Every file that the safetensors library accepts is accepted here, with one exception: if a name occurs twice,
the library drops one of the two tensors silently, and this module raises UserError.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import parse_record, quoted
from megatron_fuse.storage.strict_json import file_size, parse_object
from megatron_fuse.text_safety import brief

MOST_HEADER_BYTES = 100_000_000  # the library's own limit
METADATA = "__metadata__"
# Bits per element. fmt: off
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
# fmt: on
_FETCH = "Fetch or copy the file again."

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Tensor(BaseModel):
    model_config = ConfigDict(strict=True)

    dtype: str
    shape: Annotated[list[Count], Field(max_length=64)]  # torch has no more dimensions
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class StoredTensor:
    """dtype: as safetensors writes it (BF16).

    start, end: the tensor's bytes, counted from the begin of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """text: the JSON as it is in the file. tensors: by name, in the order of the JSON."""

    text: bytes
    tensors: dict[str, StoredTensor]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a file.

    Raises UserError, naming the file and the tensor, if it is no header or does not fit the file.
    """
    size = file_size(path)
    refuse_lfs_pointer(path)
    try:
        with path.open("rb") as file:
            text = _header_bytes(file, size, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    content = parse_object(text, str(path))
    metadata = content.pop(METADATA, None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise UserError(f"{path}: {METADATA} is {quoted(metadata)}, but must be an object of texts. {_FETCH}")
    data = 8 + len(text)
    tensors = {name: _tensor(name, entry, data, path) for name, entry in content.items()}
    _check_cover(tensors, data, size, path)
    return SafetensorsHeader(text, tensors)


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError if the file is a pointer of Git LFS.

    A pointer is a short text in the place of a large file that was not fetched.
    """
    try:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                raise UserError(
                    f"{path} is a Git LFS pointer, not the file itself. Fetch the file with git lfs pull."
                )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _header_bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, MOST_HEADER_BYTES):
        raise UserError(
            f"{path} is not a complete safetensors file: its header would have {length} bytes of {size}. "
            f"{_FETCH}"
        )
    return file.read(length)


def _tensor(name: str, entry: object, data: int, path: Path) -> StoredTensor:
    place = f"{path}: tensor {brief(name, 100)}"
    tensor = parse_record(entry, _Tensor, place, _FETCH)
    start, end = tensor.data_offsets
    if tensor.dtype not in DTYPE_BITS:
        raise UserError(
            f"{place}: dtype is {quoted(tensor.dtype)}, which safetensors does not have. {_FETCH}"
        )
    bits = math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype]
    if bits != 8 * (end - start):
        raise UserError(
            f"{place}: shape {quoted(tensor.shape)} of {tensor.dtype} needs {-(-bits // 8)} bytes, but "
            f"data_offsets {start}, {end} give {end - start}. {_FETCH}"
        )
    return StoredTensor(tensor.dtype, tuple(tensor.shape), data + start, data + end)


def _check_cover(tensors: dict[str, StoredTensor], data: int, size: int, path: Path) -> None:
    """Raises UserError unless the tensors' bytes follow one another without gaps to the end of the file."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise UserError(
                f"{path}: tensor {brief(name, 100)}: data_offsets begin at {tensor.start - data}, but the "
                f"tensors before it end at {end - data}. {_FETCH}"
            )
        end = tensor.end
    if end != size:
        what = "is cut off" if end > size else "has bytes that belong to no tensor"
        raise UserError(
            f"{path} {what}: its header describes {end} bytes (data_offsets), but the file has {size}. "
            f"{_FETCH}"
        )
