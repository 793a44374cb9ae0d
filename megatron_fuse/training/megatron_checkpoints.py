"""Checkpoints in Megatron's format `torch_dist`:
writing computes checksums, and reading runs no code of a checkpoint.

Megatron's own `save` and `load` differ between its versions. 0.17 introduced `async_strategy`, whose default
needs another package. 0.19 puts values that are no tensors into the tensors' files. So neither function is
called here. `request_save` and `load` do the same steps with functions that are the same from 0.16 to 0.19,
so that a checkpoint of one version loads in every other.

All code that depends on the internals of Megatron's and torch's checkpoints is in this file and in
write_results.py. It was checked against the sources of megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2 and of
torch 2.13 and 2.14.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, _disable_gc
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed import checkpoint
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata, ReadItem
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import LoadItemType, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_fuse.errors import UserError
from megatron_fuse.training.checkpoint_content import COMMON, FORMAT, OpenedCheckpoint
from megatron_fuse.training.checkpoint_integrity import CheckpointFiles, StoredItems
from megatron_fuse.training.stored_tensor import read_tensor

_FILES_PER_RANK = 2  # written at the same time


def request_save(state: dict[str, Any], directory: Path) -> tuple[AsyncRequest, dict[str, StoredItems]]:
    """Prepares to write a sharded state into an empty directory. All ranks call it together.

    Returns Megatron's request, which the caller executes or schedules, and a mapping. After the request's own
    finalize functions the mapping holds, on rank 0, the items of each .distcp file.
    """
    sharded, common = save_preprocess(state)
    if dist.get_rank() == 0:
        torch.save(common, directory / COMMON)
    # True: of equal shards only one rank's.
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    writer = _Writer(directory, thread_count=_FILES_PER_RANK)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planned, *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key), writer, None, 0, planner=planner
    )
    write, stage, arguments = writer.get_save_function_and_args()

    def name_format() -> None:
        if dist.get_rank() == 0:
            save_config(CheckpointingConfig(*FORMAT.values()), str(directory))

    finalize = [partial(save_state_dict_async_finalize, *planned), name_format]
    return AsyncRequest(write, arguments, finalize, preload_fn=stage), writer.written


class _Writer(FileSystemWriterAsync):
    """Plans and collects as Megatron's writer does. _write_files writes the files.

    Megatron 0.16 forks a process for each file.
    Later versions use threads, but lose the reason if a thread fails.
    """

    def __init__(self, directory: Path, thread_count: int) -> None:
        super().__init__(directory, thread_count=thread_count)
        self.written: dict[str, StoredItems] = {}

    def get_save_function_and_args(self) -> tuple[Any, Any, list[Any]]:
        """The function that writes, the one that first copies tensors from the GPU,
        and the arguments of the former.

        If this rank has no tensor, the first is None and there are no arguments.
        """
        _, stage, arguments = super().get_save_function_and_args()
        return (_write_files if arguments else None), stage, arguments

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 when all files are written. Takes the checksums out of the results, so that
        .metadata is as Megatron's.

        Raises ValueError if the items of a file leave a gap or overlap.
        """
        places = sorted(
            (result.storage_data for of_rank in results for result in of_rank),
            key=lambda place: (place.relative_path, place.offset),
        )
        for place in places:
            (checksum,), place.transform_descriptors = place.transform_descriptors, None
            file = self.written.get(place.relative_path, StoredItems(0, []))
            if place.offset != file.bytes:
                raise ValueError(f"{place.relative_path}: no item was written at byte {file.bytes}")
            end = place.offset + place.length
            self.written[place.relative_path] = StoredItems(end, [*file.items, (place.offset, checksum)])
        super().finish(metadata, results)


Items = list[tuple[WriteItem, Any]]
Bucket = tuple[str, str, tuple[Items, Items]]  # one file: path, name, (values that are no tensors, tensors)


@_disable_gc()  # a forked process must not free its parent's tensors on the GPU
def _write_files(rank: int, buckets: list[Bucket], report: Any) -> None:
    """Writes this rank's files, each in a thread:
    in this process, or in the process that an asynchronous save forks.

    Puts into `report` what Megatron's retrieve_write_results reads: the results of each file by its number,
    or the first error.
    """
    written: dict[int, list[WriteResult]] | Exception
    try:
        with _without_crc32(), ThreadPoolExecutor(len(buckets)) as threads:
            written = dict(enumerate(threads.map(_write_file, buckets)))
    except Exception as error:
        written = error
    report.put(written)


def _write_file(bucket: Bucket) -> list[WriteResult]:
    path, name, (objects, tensors) = bucket
    with open(path, "wb") as file:
        written = [
            _write_item(_Checksumming(), file, value, item, name, SerializationFormat.TORCH_SAVE)
            for item, value in (*objects, *tensors)
        ]
        os.fsync(file.fileno())
    return written


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Turns off torch's own CRC32 of each tensor within the block. No reader compares it, and it takes longer
    than the checksum."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Checksumming(_StorageWriterTransforms):
    def transform_save_stream(self, write_item: WriteItem, raw_stream: Any) -> tuple[Any, list[str]]:
        descriptors: list[str] = []
        return _ChecksummingStream(raw_stream, descriptors), descriptors


class _ChecksummingStream:
    """The stream that torch.save writes one item to.

    When it is closed it appends the item's checksum to `descriptors`.
    """

    def __init__(self, file: Any, descriptors: list[str]) -> None:
        self.file, self.digest, self.descriptors = file, xxhash.xxh3_128(), descriptors

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.flush()
        self.descriptors.append(self.digest.hexdigest())


def load(state: dict[str, Any], opened: OpenedCheckpoint) -> dict[str, Any]:
    """Reads the tensors that a sharded state names. All ranks call it together.

    If a rank fails, every rank raises CheckpointException.
    If a file is the cause, a UserError is among its failures.
    """
    wanted, local, factories = load_preprocess(state)
    wanted, _ = extract_sharded_base(wanted)
    validate_sharding_integrity(determine_global_metadata(wanted)[1])
    loaded = opened.common
    merge(loaded, local)
    merge(loaded, _load_tensors(wanted, opened))
    return apply_factory_merges(loaded, factories)


def _load_tensors(state: dict[str, Any], opened: OpenedCheckpoint) -> dict[str, Any]:
    """Fills the tensors of a sharded state, as Megatron's TorchDistLoadShardedStrategy.load does, but with
    _Reader."""
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[one for one in tensors if not one.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={one.key: one for one in tensors if one.allow_shape_mismatch},
    )
    by_key, flat_names, renamed = _replace_state_dict_keys_with_sharded_keys(state)
    unfilled = mcore_to_pyt_state_dict(by_key, True)
    checkpoint.load(unfilled, storage_reader=_Reader(opened.files, opened.metadata), planner=planner)
    values = {key: _unwrap_pyt_sharded_tensor(value) for key, value in unfilled.items()}
    loaded = _replace_sharded_keys_with_state_dict_keys(values, flat_names, renamed)
    _restore_dict_types(loaded, state)
    return loaded


class _Reader(FileSystemReader):
    """Reads each stored item once, even if it holds several shards of a rank, and compares it before a tensor
    is made of it."""

    def __init__(self, files: CheckpointFiles, metadata: Metadata) -> None:
        super().__init__(files.path)
        self.files, self.metadata = files, metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, dict[int, list[ReadItem]]] = {}
        longest = 0
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            wanted.setdefault(place.relative_path, {}).setdefault(place.offset, []).append(item)
            longest = max(longest, place.length)
        self.files.compare_all_but(
            {(name, offset) for name, by_offset in wanted.items() for offset in by_offset}
        )
        # One buffer serves all items, one after the other:
        # new memory for each would take longer than the reading.
        buffer = memoryview(bytearray(longest))
        for name, by_offset in wanted.items():
            path = self.files.path / name
            with path.open("rb", buffering=0) as file:
                for offset, items in sorted(by_offset.items()):
                    content = buffer[: self.storage_data[items[0].storage_index].length]
                    self.files.read_item(file, name, offset, content)
                    _fill(items, content, planner, f"{path}: {items[0].storage_index.fqn} at byte {offset}")
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _fill(items: list[ReadItem], content: memoryview, planner: LoadPlanner, what: str) -> None:
    """Passes a stored item to the planner, for every shard that needs a part of it."""
    if items[0].type == LoadItemType.BYTE_IO:  # a pickle, which no state of this project needs
        raise UserError(f"{what} is not a tensor. Name another checkpoint.")
    stored = read_tensor(content, what)
    for item in items:
        part = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.size() != part.size():
            raise UserError(
                f"{what} has shape {list(part.size())}, but shape {list(target.size())} is needed. Name "
                "another checkpoint."
            )
        target.copy_(part)
        planner.commit_tensor(item, target)
