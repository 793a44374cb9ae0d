"""What a checkpoint in Megatron's format `torch_dist` holds, by its small files. Readable without Megatron.

metadata.json    the name of the format
.metadata        dtype, shape and chunks of every tensor, and the place of each chunk in the .distcp files
common.pt        the part of the state that is no tensor
"""

from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint import Metadata

from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.strict_json import parse_object
from megatron_fuse.training.checkpoint_integrity import CheckpointFiles
from megatron_fuse.training.safe_unpickling import read_metadata, read_plain

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
METADATA, COMMON = "metadata.json", "common.pt"
# Further keys that Megatron-core before 0.19 writes into metadata.json. Megatron reads that file by itself,
# and a key that it does not know ends in a TypeError. So no key of ours is added.
_OTHER_KEYS = {"common_backend", "common_backend_version"}


@dataclass(frozen=True)
class OpenedCheckpoint:
    """The content of a checkpoint's small files."""

    files: CheckpointFiles
    metadata: Metadata
    common: dict[str, Any]


def open_for_loading(files: CheckpointFiles) -> OpenedCheckpoint:
    """Reads the small files of a checkpoint. No collectives.

    Raises UserError for a file that is damaged, is no part of a checkpoint of this format, or would run code.
    """
    _check_format(files)
    place = str(files.path / COMMON)
    common = read_plain(files.content(COMMON), place)
    if not isinstance(common, dict):
        raise UserError(
            f"{place} holds a {type(common).__name__} instead of a mapping. Name another checkpoint."
        )
    return OpenedCheckpoint(files, _stored_tensors(files), common)


def open_tensors(files: CheckpointFiles) -> Metadata:
    """As open_for_loading, but without common.pt: Megatron-LM stores objects of its own classes there."""
    _check_format(files)
    return _stored_tensors(files)


def _stored_tensors(files: CheckpointFiles) -> Metadata:
    metadata = read_metadata(files.content(".metadata"), str(files.path / ".metadata"))
    for place in metadata.storage_data.values():
        files.check_place(place.relative_path, place.offset, place.length)
    return metadata


def _check_format(files: CheckpointFiles) -> None:
    place = files.path / METADATA
    content = parse_object(files.content(place.name), str(place))
    form = {key: value for key, value in content.items() if key not in _OTHER_KEYS}
    if form != FORMAT:
        raise UserError(
            f"{place}: it has {quoted(form, 200)}, but a checkpoint of this version has {FORMAT}. Name "
            "another checkpoint."
        )
