"""Hugging Face weight files on disk: reads tensors or parts of them, and writes shards.

Reading is lazy: safetensors and torch's zip files are memory-mapped, so that a rank reads from disk only the
parts that it holds.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.progress import Progress
from megatron_fuse.storage import write_safetensors
from megatron_fuse.storage.records import parse_record, quoted
from megatron_fuse.storage.safetensors_header import read_safetensors_header, refuse_lfs_pointer
from megatron_fuse.storage.strict_json import file_size, read_object
from megatron_fuse.text_safety import brief

# In order of preference, an index before the single file.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SAFETENSORS_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


class WeightFiles:
    """The tensors of a Hugging Face model directory, safetensors or torch's .bin, in one file or in shards
    with an index.

    Raises UserError, which names the file, if files are missing or damaged or hold other things than tensors,
    if a tensor is not in the file that the index names, or if the index names a file outside the directory.
    No code of a pickle is run.

    A directory that can be read in two ways is an error too. transformers prefers a single file to an index,
    and reads every tensor of every shard. So such a directory could be one model as a source and another one
    as a target.
    """

    def __init__(self, model_dir: str | os.PathLike) -> None:
        self.model_dir = Path(model_dir)
        self._opened: dict[str, object] = {}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Name of each tensor -> name of its file. This opens every file, which reads its header."""
        refuse_adapter(self.model_dir)
        for single in SINGLE_FILES:
            index = self.model_dir / f"{single}.index.json"
            if index.exists():
                file_of = _read_index(index)
                self._refuse_ambiguous(file_of, index, single)
                return file_of
            if (self.model_dir / single).exists():
                return dict.fromkeys(self._open(single).keys(), single)
        raise UserError(
            f"{self.model_dir} holds no weights: it needs one of {', '.join(SINGLE_FILES)}, or an "
            ".index.json of such a name with its shards. Fetch the model again."
        )

    def _refuse_ambiguous(self, file_of: dict[str, str], index: Path, single: str) -> None:
        """Raises UserError if there is a single file besides an index with shards, or if a shard is missing
        or holds a wrong tensor.

        A wrong tensor is one that the index places in another shard.
        """
        if (path := self.model_dir / single).exists() and {*file_of.values()} != {single}:
            raise UserError(
                f"{path} and {index.name} beside it are two different sets of weights: the index names other "
                "files. Remove one of the two from the directory: the index with its shards, or the single "
                "file."
            )
        for file, name in {file: name for name, file in reversed(file_of.items())}.items():
            tensors = self._open(file, f"{brief(name, 100)} by {index.name}").keys()
            for held in tensors:
                if (placed := file_of.get(held, file)) != file:
                    raise UserError(
                        f"{self.model_dir / file} holds {brief(held, 100)}, which {index.name} places in "
                        f"{brief(placed, 100)}. Fetch the model again into an empty directory, or remove the "
                        "tensor from one of the two files."
                    )

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        part = self._part(name)
        return tuple(part.shape if isinstance(part, Tensor) else part.get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's dtype in the file, without reading the tensor:
        one of DTYPES, or the library's name of another dtype."""
        part = self._part(name)
        dtype = part.dtype if isinstance(part, Tensor) else part.get_dtype()
        return (_SAFETENSORS_DTYPES | {value: key for key, value in DTYPES.items()}).get(dtype, str(dtype))

    def read(self, name: str, dim: int, start: int, size: int) -> Tensor:
        """The elements start ... start + size - 1 of dimension dim (0 or 1), in the file's dtype. Only these
        are read from disk."""
        index = (slice(None),) * dim + (slice(start, start + size),)
        return self._part(name)[index]

    def open_all(self) -> int:
        """Opens every file and returns the sum of their bytes.

        Raises UserError for a missing or damaged file.
        """
        return sum(file_size(self.model_dir / file) for file in {*self.file_of.values()})

    def place(self, name: str) -> str:
        """File and name of a tensor, for errors."""
        return f"{self.model_dir / self.file_of[name]}: {brief(name, 100)}"

    def _part(self, name: str) -> Any:  # a safetensors slice or a memory-mapped tensor
        if name not in self.file_of:
            raise UserError(
                f"{self.model_dir} does not have the tensor {brief(name, 100)}. Fetch the model again."
            )
        file = self._open(self.file_of[name])
        try:
            return file[name] if isinstance(file, Mapping) else file.get_slice(name)
        except (KeyError, SafetensorError):
            raise UserError(
                f"{self.model_dir / self.file_of[name]} does not have {brief(name, 100)}, which the index "
                "places there. Fetch the model again."
            ) from None

    # A safetensors file or the tensors of a .bin file.
    def _open(self, file: str, wanted: str = "weights") -> Any:
        if file not in self._opened:
            path = self.model_dir / file
            if not path.exists():
                raise UserError(f"{path} is missing; it must hold {wanted}. Fetch the model again.")
            file_size(path)  # raises UserError if the path is no file
            self._opened[file] = _open_safetensors(path) if file.endswith(".safetensors") else _load_bin(path)
        return self._opened[file]


def refuse_adapter(model_dir: Path) -> None:
    """Raises UserError if there is an adapter beside a model:
    transformers applies it only if `peft` is installed."""
    if (adapter := model_dir / "adapter_config.json").exists():
        raise UserError(
            f"{adapter}: there is an adapter beside a whole model, and it is not clear whether to apply it. "
            "Merge it into the weights (peft's merge_and_unload), or remove its files from the directory."
        )


def shards_of(model_dir: Path) -> dict[str, set[str]]:
    """Suffix of the shards (".safetensors", ".bin") -> their names, for every index that a directory has.

    Raises UserError for a malformed index. Does not check that the shards exist.
    """
    indexes = {PurePath(single).suffix: model_dir / f"{single}.index.json" for single in SINGLE_FILES}
    return {suffix: {*_read_index(index).values()} for suffix, index in indexes.items() if index.exists()}


def _read_index(index: Path) -> dict[str, str]:
    file_of = parse_record(read_object(index), _Index, str(index), "Fetch the model again.").weight_map
    if not file_of:
        raise UserError(f"{index}: weight_map is empty. Fetch the model again.")
    for name, file in file_of.items():
        path = PurePath(file)
        if (
            not file.isprintable()
            or not path.name
            or len(file) > 255
            or path.is_absolute()
            or ".." in path.parts
        ):
            raise UserError(
                f"{index}: weight_map.{brief(name, 100)} is {quoted(file)}, but must be the name of a file "
                "in the directory"
            )
    return file_of


class _Index(BaseModel):
    model_config = ConfigDict(strict=True)

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None  # transformers reads it


def _open_safetensors(path: Path) -> safe_open:
    read_safetensors_header(path)  # the library's own errors do not name the tensor
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # OSError and SafetensorError, by what is wrong
        raise UserError(f"{path} cannot be read ({brief(str(error))}). Fetch the model again.") from error


def _load_bin(path: Path) -> Mapping[str, Tensor]:
    refuse_lfs_pointer(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle report damage in many classes
        called = re.search(r"GLOBAL (\S+)", str(error))  # so torch names what a pickle would call
        if called:
            raise _not_tensors_alone(path, f"reading it would run {brief(called[1], 100)}") from error
        raise UserError(f"{path} cannot be read ({brief(str(error))}). Fetch the model again.") from error
    if not isinstance(content, Mapping):
        raise _not_tensors_alone(path, f"its top level is a {type(content).__name__}")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise _not_tensors_alone(path, f"{quoted(name)} is a {type(value).__name__}")
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise _not_tensors_alone(path, f"{quoted(name)} is sparse, quantised or empty")
        # A view may repeat its elements: a few bytes in the file, terabytes in memory.
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise _not_tensors_alone(
                path, f"{quoted(name)} of shape {list(value.shape)} repeats what is stored"
            )
    return content


def common_dtype(dtypes: Iterable[str]) -> str:
    """The smallest of DTYPES that holds all values of these dtypes. For bf16 and fp16 that is fp32: neither
    holds the other."""
    given = set(dtypes)
    return given.pop() if len(given) == 1 else "fp32"


def _not_tensors_alone(path: Path, content: str) -> UserError:
    return UserError(
        f"{path} holds not only named tensors ({content}). Save the tensors alone as safetensors."
    )


def write_weight_files(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Writes model.safetensors, or shards of at most shard_bytes (but at least one tensor) with their index.

    tensor(name): makes one tensor of shape shapes[name] and of dtype. Only the tensors of one shard are in
    memory at a time.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = list(_shards(sizes, shard_bytes))
    file_of: dict[str, str] = {}
    with Progress("model.safetensors", "tensors", len(sizes)) as progress:

        def shown(count: int, name: str) -> torch.Tensor:
            progress.update(count)
            return tensor(name)

        for number, names in enumerate(shards, 1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            tensors = {name: shown(count, name) for count, name in enumerate(names, len(file_of))}
            # transformers refuses a file that does not say that it comes from torch.
            write_safetensors(directory / file, tensors, {"format": "pt"})
            del tensors  # else they would still be there while those of the next file are made
            file_of |= dict.fromkeys(names, file)
        progress.update(len(file_of))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> Iterable[list[str]]:
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names
