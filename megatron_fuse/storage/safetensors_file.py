"""Writes safetensors files through the project's own temporary files.

The safetensors library writes its own temporary file with mode 0600 and renames it. The result keeps that
mode, whatever the umask is. After a kill the temporary file stays, and remove_abandoned does not know it. The
bytes written here are the same as the library's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.storage.files import temporary_then_rename

# Names of the format, in its order: as in the library, the widest type comes first, so that every tensor is
# aligned.
_DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes numpy arrays or torch tensors on the CPU as one safetensors file, whole or not at all.

    Only one tensor at a time is copied in memory. Raises UserError for an error of the operating system,
    ValueError for a dtype that is not in the table above.
    """
    order = sorted(tensors, key=lambda name: (_place(tensors[name], name), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        dtype = _DTYPES[_dtype_name(tensors[name])]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with temporary_then_rename(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in order:
            file.write(_bytes_of(tensors[name]))


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(tensor: Any, name: str) -> int:
    try:
        return list(_DTYPES).index(_dtype_name(tensor))
    except ValueError:
        raise ValueError(f"tensor {name}: {tensor.dtype} cannot be written as safetensors") from None


def _bytes_of(tensor: Any) -> memoryview:
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch  # only for tensors: their maker has imported torch already

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
