"""Hugging Face weight files on disk: read by the tensor, or by a part of one; written in shards.

Reading is lazy: safetensors and torch's zip files are memory-mapped, so that a rank reads from disk only what it holds.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.storage import write_safetensors

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference, an index before the single file
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WeightFiles:
    """The tensors of a Hugging Face model directory, safetensors or torch's .bin, in one file or in shards with an index.

    Raises UserError, naming the file, where files are missing, damaged or hold more than tensors, or a tensor is not where the
    index says. No pickle's code is run.
    """

    def __init__(self, model_dir: str | os.PathLike) -> None:
        self.model_dir = Path(model_dir)
        self._opened: dict[str, object] = {}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """The file that holds each tensor, both by name."""
        for single in SINGLE_FILES:
            index = self.model_dir / f"{single}.index.json"
            if index.exists():
                return self._read_index(index)
            if (self.model_dir / single).exists():
                return dict.fromkeys(self._open(single).keys(), single)
        raise UserError(
            f"{self.model_dir} holds no weights: expected one of {', '.join(SINGLE_FILES)} or its .index.json with shards"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        part = self._part(name)
        return tuple(part.shape if isinstance(part, Tensor) else part.get_shape())

    def read(self, name: str, dim: int, start: int, size: int) -> Tensor:
        """Elements start .. start + size of dimension dim (0 or 1), in the file's dtype; only they are read."""
        index = (slice(None),) * dim + (slice(start, start + size),)
        return self._part(name)[index]

    def _part(self, name: str):  # type: ignore[no-untyped-def]  # a safetensors slice or a memory-mapped tensor
        file = self._open(self.file_of[name])
        try:
            return file[name] if isinstance(file, Mapping) else file.get_slice(name)
        except (KeyError, SafetensorError):
            raise UserError(
                f"{self.model_dir / self.file_of[name]} lacks {name}, which the index places there"
            ) from None

    def _open(self, file: str):  # type: ignore[no-untyped-def]
        if file not in self._opened:
            path = self.model_dir / file
            try:
                self._opened[file] = (
                    safe_open(path, framework="pt") if file.endswith(".safetensors") else _load_bin(path)
                )
            except FileNotFoundError:
                raise UserError(f"{path} is missing: fetch the model again") from None
            except UserError:
                raise
            except Exception as error:  # the two formats report damage in classes of their own
                called = re.search(r"GLOBAL (\S+)", str(error))  # so torch names what a pickle would call
                if called:
                    raise _not_tensors_alone(path, f"reading it would run {called[1]}") from error
                raise UserError(f"{path} cannot be read, fetch the model again: {error}") from error
        return self._opened[file]

    @staticmethod
    def _read_index(index: Path) -> dict[str, str]:
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not a weight index with a 'weight_map': {error!r}") from error


def _load_bin(path: Path) -> Mapping[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:  # files from before torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise _not_tensors_alone(path, f"its top level is a {type(content).__name__}")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise _not_tensors_alone(path, f"{name!r} is a {type(value).__name__}")
    return content


def _not_tensors_alone(path: Path, found: str) -> UserError:
    return UserError(
        f"{path} holds other things than named tensors ({found}): have the tensors alone saved as safetensors"
    )


def write_weight_files(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Writes safetensors, model.safetensors or shards of at most shard_bytes (one tensor at least) with their index.

    tensor(name) makes one tensor, [shapes[name]] of dtype; no more than a shard of them is held at a time.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = list(_shards(sizes, shard_bytes))
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # transformers refuses a file that does not say that it comes from torch.
        write_safetensors(directory / file, {name: tensor(name) for name in names}, {"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
