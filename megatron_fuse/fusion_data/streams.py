"""Ragged integer streams on disk in Megatron's .bin/.idx format: per example one sequence, also one document.

`PREFIX.bin` holds the concatenated values of all sequences, `PREFIX.idx` their lengths.
megatron.core.datasets.indexed_dataset can open these files. This module writes and reads them without
Megatron for three reasons: whole shards are written at once; thousands of shards may be open (each memory map
of numpy keeps a file descriptor, those of torch keep none); and the stages before training need no Megatron.

    .idx: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 n, uint64 n + 1,
          int32 [n] lengths, int64 [n] byte offsets, int64 [n + 1] document bounds
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_fuse import ragged
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[np.dtype, int] = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def write_stream(prefix: str | Path, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
    """Writes PREFIX.bin and PREFIX.idx.

    values [sum(lengths)] uint8, uint16 or int32; lengths [n], zeros allowed. Raises ValueError if the lengths
    do not add up to the number of values.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.sum() != len(values):
        raise ValueError(
            f"{prefix}: there are {len(values)} values, but the lengths add up to {lengths.sum()}"
        )
    # An empty file cannot be memory-mapped. So a shard without values gets one value, which belongs to no
    # sequence.
    Path(f"{prefix}.bin").write_bytes(values.tobytes() if len(values) else bytes(values.dtype.itemsize))
    Path(f"{prefix}.idx").write_bytes(_index(lengths, values.dtype))


def _index(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The .idx file of sequences of these lengths, int64 [n]."""
    header = _HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(lengths) + 1)
    offsets = ragged.offsets(lengths)[:-1] * dtype.itemsize
    bounds = np.arange(len(lengths) + 1, dtype=np.int64)
    return b"".join([header, lengths.astype(np.int32).tobytes(), offsets.tobytes(), bounds.tobytes()])


class Stream:
    """One field of all examples over all shards: stream[i] is a read-only view of the mapped file, nothing is
    copied.

    Opening reads every index and the size of every file; 8 bytes per example stay in memory. A shard is
    mapped when it is first read. So the rows of a source that no example selects take no mapping. Linux
    allows a process 65530 mappings (vm.max_map_count).
    """

    def __init__(self, prefixes: Sequence[str | Path]) -> None:
        """prefixes: of the shards, in order.

        Raises UserError if a file is missing, or an index is damaged or does not fit.
        """
        shards = [_read_index(str(prefix)) for prefix in prefixes]
        self._files = [(f"{prefix}.bin", dtype) for prefix, (_, dtype) in zip(prefixes, shards, strict=True)]
        self._mapped: list[np.ndarray | None] = [None] * len(shards)
        lengths = [np.zeros(0, np.int64), *(lengths for lengths, _ in shards)]
        self._offsets = ragged.offsets(np.concatenate(lengths))  # [n + 1], over all shards
        # Example of each shard, and n.
        self._first = ragged.offsets([len(lengths) for lengths, _ in shards]).tolist()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64: number of values of every example."""
        return np.diff(self._offsets)

    def __getitem__(self, example: int) -> np.ndarray:
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of {len(self)}")
        shard = bisect_right(self._first, example) - 1
        offset = self._offsets.item  # gives a Python int, several times faster than a numpy int
        base = offset(self._first[shard])
        return self._shard(shard)[offset(example) - base : offset(example + 1) - base]

    def values(self) -> np.ndarray:
        """All sequences concatenated: for one shard a view of the mapped file, for several shards a copy."""
        shards = [self._shard(shard) for shard in range(len(self._files))]
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    def _shard(self, shard: int) -> np.ndarray:
        values = self._mapped[shard]
        if values is None:
            size = int(self._offsets[self._first[shard + 1]] - self._offsets[self._first[shard]])
            values = self._mapped[shard] = _map_values(*self._files[shard], size)
        return values


def _read_index(prefix: str) -> tuple[np.ndarray, np.dtype]:
    """(lengths int32 [n], dtype of the values) of one shard.

    Raises UserError if its files are damaged or do not agree.
    """
    index_path, values_path = f"{prefix}.idx", f"{prefix}.bin"
    fix = f"Restore the file, or remove {Path(prefix).parent} and run {BUILT_BY} again."
    try:
        index = Path(index_path).read_bytes()
        size = os.stat(values_path).st_size
    except OSError as error:
        said = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{error.filename}: {said}. {fix}") from error
    fields = _HEADER.unpack_from(index) if len(index) >= _HEADER.size else (None,) * 5
    if fields[0] != _MAGIC or fields[2] not in _DTYPES or len(index) != _HEADER.size + 20 * fields[3] + 8:
        raise UserError(f"{index_path}: not a complete index of the form .bin/.idx. {fix}")
    dtype = _DTYPES[fields[2]]
    lengths = np.frombuffer(index, np.int32, fields[3], _HEADER.size)
    needed = _file_size(int(lengths.sum(dtype=np.int64)), dtype)
    if lengths.min(initial=0) < 0:
        raise UserError(f"{index_path}: a length is below 0. {fix}")
    # Megatron reads the offsets and bounds too: they must fit the lengths.
    if index != _index(lengths.astype(np.int64), dtype):
        raise UserError(f"{index_path}: the lengths, offsets and bounds contradict each other. {fix}")
    if size != needed:
        raise UserError(f"{values_path}: the file has {size} bytes, but its index describes {needed}. {fix}")
    return lengths, dtype


def _file_size(values: int, dtype: np.dtype) -> int:
    return max(values, 1) * dtype.itemsize  # see write_stream


def _map_values(path: str, dtype: np.dtype, values: int) -> np.ndarray:
    """The values of a whole file. Raises UserError if the file has changed since the stream was opened.

    The size is compared once more, because the mapping may come hours after the opening. Reading a map beyond
    the end of its file would kill the process (SIGBUS).
    """
    size = _file_size(values, dtype)
    try:
        present = os.stat(path).st_size
        if present != size:
            raise UserError(
                f"{path}: the file has {present} bytes, but had {size} when it was opened. Do not change "
                "fusion data while a command reads them."
            )
        mapped = (
            torch.from_file(path, shared=False, size=size, dtype=torch.uint8).numpy().view(dtype)[:values]
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: the file can no longer be read ({error}). Do not change fusion data while a command "
            "reads them."
        ) from error
    mapped.flags.writeable = False
    return mapped
