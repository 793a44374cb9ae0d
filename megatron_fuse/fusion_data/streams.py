"""Ragged integer streams on disk in Megatron's .bin/.idx form: one sequence, which is also one document, per example.

`PREFIX.bin` holds the values of all sequences on end, `PREFIX.idx` their lengths; megatron.core.datasets.indexed_dataset opens
them. Written and read here without Megatron, because whole shards are written at once, because thousands of shards may be open
(numpy's memory maps keep a file descriptor each, torch's none) and because the stages before training need no Megatron.

    .idx: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 n, uint64 n + 1,
          int32 [n] lengths, int64 [n] byte offsets, int64 [n + 1] document bounds
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_fuse.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def write_stream(prefix: str | Path, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
    """Writes PREFIX.bin and PREFIX.idx. values [sum(lengths)] uint8, uint16 or int32; lengths [n], zeros allowed."""
    lengths = np.asarray(lengths, np.int64)
    if lengths.sum() != len(values):
        raise ValueError(f"{prefix}: {len(values)} values for sequences of {lengths.sum()} in all")
    # An empty file cannot be memory-mapped: one value that belongs to no sequence stands in.
    Path(f"{prefix}.bin").write_bytes(values.tobytes() if len(values) else bytes(values.dtype.itemsize))
    offsets = (np.cumsum(lengths) - lengths) * values.dtype.itemsize
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[values.dtype], len(lengths), len(lengths) + 1))
        file.write(lengths.astype(np.int32).tobytes())
        file.write(offsets.tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def _open_shard(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, memory-mapped and read-only; lengths int64 [n]) of one shard."""
    index_path, values_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    mend = f"restore it or remove {index_path.parent} and run tools/build_fusion_data.py again"
    for path in (index_path, values_path):
        if not path.exists():
            raise UserError(f"{path}: missing: {mend}")
    index = index_path.read_bytes()
    fields = _HEADER.unpack_from(index) if len(index) >= _HEADER.size else (None,) * 5
    if fields[0] != _MAGIC or fields[2] not in _DTYPES or len(index) != _HEADER.size + 20 * fields[3] + 8:
        raise UserError(f"{index_path}: not a whole index of the form .bin/.idx: {mend}")
    dtype = _DTYPES[fields[2]]
    lengths = np.frombuffer(index, np.int32, fields[3], _HEADER.size).astype(np.int64)
    size, needed = values_path.stat().st_size, max(int(lengths.sum()), 1) * dtype.itemsize
    if size != needed:
        raise UserError(f"{values_path}: {size} bytes, but its index describes {needed}: {mend}")
    mapped = torch.from_file(str(values_path), shared=False, size=size, dtype=torch.uint8).numpy().view(dtype)
    mapped.flags.writeable = False
    return mapped, lengths


class Stream:
    """One field of all examples over all shards: stream[i] is a read-only view of the mapped file, nothing is copied."""

    def __init__(self, prefixes: Sequence[str | Path]) -> None:
        shards = [_open_shard(str(prefix)) for prefix in prefixes]
        self._values = [values for values, _ in shards]
        self._offsets = [np.concatenate([[0], np.cumsum(lengths)]) for _, lengths in shards]
        self._first = np.concatenate([[0], np.cumsum([len(lengths) for _, lengths in shards])])
        self.lengths: np.ndarray = np.concatenate([lengths for _, lengths in shards])  # [n] int64

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, example: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first, example, side="right")) - 1
        start, stop = self._offsets[shard][example - self._first[shard] :][:2]
        return self._values[shard][start:stop]
