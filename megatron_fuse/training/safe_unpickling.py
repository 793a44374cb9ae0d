"""Reads the pickles of a checkpoint without running the functions that they name.

In general a pickle can call any function that it names. Here a name outside an allow-list is an error while
the pickle is read. A name inside the list stands for a record class of this file, so that a crafted file
cannot even change a class of torch.
"""

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_fuse.errors import UserError

_FIX = "Name another checkpoint."
_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
# All classes whose objects torch's and Megatron's writers put into .metadata.
_RECORDS = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # Megatron adds the plans by which the ranks wrote. Nothing reads them here.
        (_PLANNER, "SavePlan"),
        (_PLANNER, "WriteItem"),
        (_PLANNER, "WriteItemType"),
        (_PLANNER, "TensorWriteData"),
        ("torch.serialization", "_get_layout"),
    }
)
_PLAIN = (str, int, float, bool, type(None))


class _Record:
    """An object of a pickle: the name of its class, its constructor's arguments and its attributes."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None


class _Size(tuple):
    """torch.Size in a pickle."""


class _MetadataUnpickler(pickle.Unpickler):
    """Makes new record classes for each file, so that a crafted pickle cannot change those of another
    file."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _RECORDS:
            return self.made.setdefault(key, type(name, (_Record,), {"kind": name}))
        if key == ("torch", "Size"):
            return self.made.setdefault(key, type("Size", (_Size,), {}))
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise UserError(f"would run {module}.{name}")


def read_metadata(content: bytes, place: str) -> Metadata:
    """The content of a checkpoint's .metadata: dtype, shape and chunks of every tensor, and the file and
    offset of each chunk.

    place: the file, for the error.
    Raises UserError for a pickle that names another function or class, or has another structure.
    """
    try:
        return _as_metadata(_MetadataUnpickler(content).load())
    except UserError as error:
        raise UserError(
            f"{place} {error}, which no checkpoint of this project does. Do not load this file. {_FIX}"
        ) from error
    except Exception as error:  # a pickle that is cut off or damaged ends in almost any class
        raise UserError(f"{place}: damaged ({type(error).__name__}: {str(error)[:100]}). {_FIX}") from error


def _as_metadata(record: Any) -> Metadata:
    tensors, places = (
        _checked(_kind(record, "Metadata").field(key), dict)
        for key in ("state_dict_metadata", "storage_data")
    )
    return Metadata(
        state_dict_metadata={_checked(key, str): _as_storage(value) for key, value in tensors.items()},
        storage_data={_as_index(key): _as_place(value) for key, value in places.items()},
    )


def _as_storage(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _kind(record).kind == "BytesStorageMetadata":
        return BytesStorageMetadata()
    record = _kind(record, "TensorStorageMetadata")
    properties = _checked(
        getattr(_kind(record.field("properties"), "TensorProperties"), "state", None), tuple
    )
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_checked(properties[0], torch.dtype)),
        size=_as_size(record.field("size")),
        chunks=[
            ChunkStorageMetadata(
                offsets=_as_size(chunk.field("offsets")), sizes=_as_size(chunk.field("sizes"))
            )
            for chunk in (
                _kind(one, "ChunkStorageMetadata") for one in _checked(record.field("chunks"), list)
            )
        ],
    )


def _as_index(record: Any) -> MetadataIndex:
    record = _kind(record, "MetadataIndex")
    offset, index = record.field("offset"), record.field("index")
    return MetadataIndex(
        _checked(record.field("fqn"), str),
        None if offset is None else _as_size(offset),
        None if index is None else _checked(index, int),
    )


def _as_place(record: Any) -> _StorageInfo:
    record = _kind(record, "_StorageInfo")
    name, offset, length = (record.field(key) for key in ("relative_path", "offset", "length"))
    if record.field("transform_descriptors"):
        raise ValueError("tensors are stored in a transformed way")
    if _checked(offset, int) < 0 or _checked(length, int) < 0:
        raise ValueError(f"offset {offset}, length {length}")
    return _StorageInfo(_checked(name, str), offset, length)


def _as_size(value: Any) -> torch.Size:
    return torch.Size([_checked(length, int) for length in _checked(value, _Size)])


def _kind(record: Any, kind: str | None = None) -> Any:
    if not isinstance(record, _Record) or kind not in (None, type(record).kind):  # type: ignore[attr-defined]
        raise ValueError(f"a {type(record).__name__} instead of {kind or 'a record'}")
    return record


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"a {type(value).__name__} instead of {kind.__name__}")
    return value


def read_plain(content: bytes, place: str) -> Any:
    """The content of a torch.save file that holds plain Python values and tensors alone.

    place: the file, for the error. Raises UserError for any other content.
    """
    try:
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damage and refusals are reported in classes of several libraries
        reason = next(iter(str(error).splitlines()), "")[:160]
        raise UserError(
            f"{place} cannot be read without running code, or is damaged ({reason}). {_FIX}"
        ) from error
    if (foreign_type := _not_plain(value)) is not None:
        raise UserError(f"{place} holds {foreign_type}, which no checkpoint of this project does. {_FIX}")
    return value


def _not_plain(value: Any) -> str | None:
    """The type of the first part of a value that is not plain, None if all parts are plain."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if type(one) in (dict, list, tuple):
            if id(one) in seen:  # a list may hold itself
                continue
            seen.add(id(one))
        if type(one) is dict:
            waiting += [*one.keys(), *one.values()]
        elif type(one) in (list, tuple):
            waiting += one
        elif type(one) not in (torch.Tensor, *_PLAIN):
            return f"a {type(one).__name__}"
    return None
