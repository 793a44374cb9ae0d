"""The parameters of a checkpoint in Megatron's format, of any layout, read one at a time.

Neither Megatron nor other ranks are needed. The checkpoint may be of another program, such as Megatron-LM:
then it has no checksums, and its sizes are compared with the architecture when the parameters are used.

Equal layers are stored as one tensor, with the layer as its first dimension:
`decoder.layers.mlp.linear_fc1.weight` [layers, rows, columns]. So are the experts of a layer:
`decoder.layers.mlp.experts.experts.linear_fc1.weight` [layers, experts, rows, columns]. Each rank stored its
part of a layer as a chunk.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.hugging_face_files import WholeParameters
from megatron_fuse.training.checkpoint_content import open_tensors
from megatron_fuse.training.checkpoint_integrity import CHECKSUMS, CheckpointFiles
from megatron_fuse.training.checkpoint_metadata import metadata_in, open_files, refuse_other_model
from megatron_fuse.training.stored_tensor import read_tensor

# The state of a training, as Megatron-core and Megatron-LM name its tensors. Everything else is a parameter.
_NO_PARAMETER = re.compile(
    r"(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param_scheduler)\b.*"
)
_LAYERS, _EXPERTS = "decoder.layers.", ".mlp.experts.experts."


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of a parameter, stored as one item of a file."""

    begins: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int  # bytes


@dataclass(frozen=True)
class _StoredParameter:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[_Chunk]
    stacked: int  # dimensions of size 1 in front of the stored tensors: layer and expert


@contextmanager
def stored_parameters(path: Path, architecture: Architecture, *, verify: bool) -> Iterator[WholeParameters]:
    """Within the block the parameters of a checkpoint can be read.

    verify: compare the checksums of all files, also of those that no parameter needs. That happens in
    threads; damage there is raised at the end of the block. Raises UserError for a damaged checkpoint, and
    for one of another model.
    """
    is_ours = (path / "facts.json").exists() or (path / CHECKSUMS).exists()
    files = open_files(path, verify) if is_ours else CheckpointFiles(path, verify=verify)
    if is_ours:
        refuse_other_model(path, metadata_in(files), architecture)
        files.compare_sizes(0, 1)
    parameters = dict(_parameters(open_tensors(files), path))

    def read(name: str) -> Tensor:
        return _read(files, parameters[name], f"{name} of {path}")

    with files.comparing_rest(0, 1):
        every = [chunk for parameter in parameters.values() for chunk in parameter.chunks]
        files.compare_all_but({(chunk.file, chunk.offset) for chunk in every})
        yield WholeParameters(list(parameters), read, str(path))


def _parameters(metadata: Any, path: Path) -> Iterator[tuple[str, _StoredParameter]]:
    """Yields every parameter of a checkpoint with its name in a GPTModel.

    Raises UserError if the chunks of one do not make a whole.
    """
    for key, stored in metadata.state_dict_metadata.items():
        # Values that are no tensors are scales of fp8, which is not used here.
        if not isinstance(stored, TensorStorageMetadata) or _NO_PARAMETER.fullmatch(key):
            continue
        has_layer = key.startswith(_LAYERS) and not key.removeprefix(_LAYERS)[0].isdigit()
        stacked = has_layer + (_EXPERTS in key)
        chunks: dict[tuple[int, ...], list[_Chunk]] = {}
        for chunk in stored.chunks:
            begins, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if {*sizes[:stacked]} - {1}:
                raise UserError(f"{path}: {key} is not stored layer by layer. Name another checkpoint.")
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            chunks.setdefault(begins[:stacked], []).append(
                _Chunk(begins[stacked:], sizes[stacked:], place.relative_path, place.offset, place.length)
            )
        # Before the numbers are counted: those of a damaged file could fill the memory.
        if len(chunks) != math.prod(stored.size[:stacked]):
            raise UserError(f"{path}: .metadata does not place all of {key}. Name another checkpoint.")
        for number in product(*map(range, stored.size[:stacked])):
            name = f"{_LAYERS}{number[0]}.{key.removeprefix(_LAYERS)}" if has_layer else key
            if _EXPERTS in name:
                name = name.replace(_EXPERTS, f".mlp.experts.local_experts.{number[-1]}.")
            shape, parts = tuple(stored.size[stacked:]), chunks.get(number, [])
            if sum(math.prod(part.sizes) for part in parts) != math.prod(shape):
                raise UserError(f"{path}: .metadata does not place all of {name}. Name another checkpoint.")
            yield name, _StoredParameter(stored.properties.dtype, shape, parts, stacked)


def _read(files: CheckpointFiles, parameter: _StoredParameter, what: str) -> Tensor:
    result = torch.empty(parameter.shape, dtype=parameter.dtype)
    for chunk in parameter.chunks:
        path = files.path / chunk.file
        content = memoryview(bytearray(chunk.length))
        with path.open("rb", buffering=0) as file:
            files.read_item(file, chunk.file, chunk.offset, content)
        stored = read_tensor(content, f"{path}: {what} at byte {chunk.offset}")
        sizes = (1,) * parameter.stacked + chunk.sizes
        if tuple(stored.shape) != sizes:
            raise UserError(
                f"{path}: {what} at byte {chunk.offset} has shape {list(stored.shape)} instead of "
                f"{list(sizes)}. Name another checkpoint."
            )
        region = tuple(
            slice(begin, begin + size) for begin, size in zip(chunk.begins, chunk.sizes, strict=True)
        )
        result[region] = stored[(0,) * parameter.stacked]
    return result
