"""What of Megatron's dist_checkpointing is replaced: writing computes checksums, and reading runs no code of a checkpoint.

The format is Megatron's own (`torch_dist`). All that depends on its inner workings and on those of torch's distributed checkpoints
is in this file and in write_results.py, and was read in megatron-core 0.16.1 and torch 2.13.
"""

from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata, ReadItem
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.planner import LoadItemType, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.strict_json import parse_object
from megatron_fuse.training.checkpoint_integrity import CheckpointFiles, StoredItems
from megatron_fuse.training.safe_unpickling import read_metadata, read_plain
from megatron_fuse.training.stored_tensor import read_tensor

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
# What else Megatron-core writes there. It reads the file again by itself, and a key that it does not know ends in a TypeError.
_OTHER_KEYS = {"common_backend_version"}


def request_save(state: dict[str, Any], directory: Path) -> tuple[AsyncRequest, dict[str, StoredItems]]:
    """Prepares writing a sharded state into an empty directory, all ranks together.

    Returns Megatron's request, to be executed or scheduled, and on rank 0 a mapping that holds the items of each .distcp file once the
    request's own finalize functions have run.
    """
    strategy = _SaveStrategy("torch_dist", 1)
    request = dist_checkpointing.save(state, str(directory), sharded_strategy=strategy, async_sharded_save=True)
    return request, strategy.written


class _SaveStrategy(TorchDistSaveShardedStrategy):
    def __init__(self, backend: str, version: int) -> None:
        super().__init__(backend, version)
        self.written: dict[str, StoredItems] = {}

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        """As the base class, with a writer of ours and without its cache of plans."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = _Writer(checkpoint_dir, thread_count=self.thread_count)
        writer.written = self.written
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key), writer, None, 0, planner=planner)
        return self._get_save_and_finalize_callbacks(writer, planned)


class _Writer(FileSystemWriterAsync):
    """transforms: an attribute that the processes which write the files are given."""

    written: dict[str, StoredItems]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.transforms = _Checksumming()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, once all is written: takes the checksums out of the results, so that .metadata is as Megatron writes it."""
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


class _Checksumming(_StorageWriterTransforms):
    """Used in the processes that write the files."""

    def transform_save_stream(self, write_item: WriteItem, raw_stream: Any) -> tuple[Any, list[str]]:
        descriptors: list[str] = []
        return _ChecksummingStream(raw_stream, descriptors), descriptors


class _ChecksummingStream:
    """What torch.save writes one item to. On closing it appends the item's checksum to `descriptors`.

    torch's own CRC32 of each tensor, which no reader compares, is left out meanwhile: it takes longer than the checksum.
    """

    def __init__(self, file: Any, descriptors: list[str]) -> None:
        self.file, self.digest, self.descriptors = file, xxhash.xxh3_128(), descriptors
        self.crc32 = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        torch.serialization.set_crc32_options(self.crc32)
        self.file.flush()
        self.descriptors.append(self.digest.hexdigest())


Strategies = tuple["_LoadStrategy", "_LoadCommon"]


def open_for_loading(files: CheckpointFiles) -> Strategies:
    """What `load` needs, from the small files of a checkpoint. No collectives.

    Raises UserError for a file that is damaged, is no part of a checkpoint of this format, or would run code.
    """
    _check_format(files)
    common = read_plain(files.content("common.pt"), str(files.path / "common.pt"))
    if not isinstance(common, dict):
        raise UserError(f"{files.path / 'common.pt'} holds a {type(common).__name__}: name another checkpoint")
    metadata = read_metadata(files.content(".metadata"), str(files.path / ".metadata"))
    for place in metadata.storage_data.values():
        files.check_place(place.relative_path, place.offset, place.length)
    return _LoadStrategy(metadata, files), _LoadCommon(common)


def load(state: dict[str, Any], path: Path, strategies: Strategies) -> dict[str, Any]:
    """Reads what a sharded state asks for, all ranks together.

    Raises CheckpointException on every rank where one failed; a UserError is among its failures where a file is to blame.
    """
    sharded, common = strategies
    return dist_checkpointing.load(state, str(path), sharded_strategy=sharded, common_strategy=common)


def _check_format(files: CheckpointFiles) -> None:
    place = files.path / "metadata.json"
    content = parse_object(files.content(place.name), str(place))
    found = {key: value for key, value in content.items() if key not in _OTHER_KEYS}
    if found != _FORMAT:
        raise UserError(
            f"{place}: has {quoted(found, 200)}, a checkpoint of this version has {_FORMAT}: name another checkpoint"
        )


class _LoadCommon(TorchCommonLoadStrategy):
    """The state that is no tensor, from a file that was read before."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return self.content


class _LoadStrategy(TorchDistLoadShardedStrategy):
    def __init__(self, metadata: Metadata, files: CheckpointFiles) -> None:
        super().__init__()
        self.metadata, self.files = metadata, files

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        """As the base class, with a reader of ours."""
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[one for one in tensors if not one.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={one.key: one for one in tensors if one.allow_shape_mismatch},
        )
        by_key, flat_names, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        checkpoint.load_state_dict(state, _Reader(self.files, self.metadata), planner=planner)
        values = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(values, flat_names, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _Reader(FileSystemReader):
    """Reads each stored item once, however many shards of a rank lie in it, and compares it before anything is made of it."""

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
        self.files.compare_all_but({(name, offset) for name, by_offset in wanted.items() for offset in by_offset})
        buffer = memoryview(bytearray(longest))  # for one item after another: fresh memory costs more than reading
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
    """Hands a stored item to the planner, for every shard that asks for a part of it."""
    if items[0].type == LoadItemType.BYTE_IO:  # a pickle, for which no state of ours asks
        raise UserError(f"{what} is no tensor")
    stored = read_tensor(content, what)
    for item in items:
        part = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.size() != part.size():
            raise UserError(f"{what} has {list(part.size())} where {list(target.size())} is wanted")
        target.copy_(part)
        planner.commit_tensor(item, target)
