"""A Hugging Face directory of a model, assembled from Megatron's parameters.

Parameters are read one at a time, when a tensor needs them, and let go after the last tensor that does. So
the memory is that of one shard of the output and of a few parameters, however large the model is.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, read_architecture
from megatron_fuse.model.carried_files import write_beside_weights
from megatron_fuse.model.expected_weights import hugging_face_shapes, refuse_non_finite
from megatron_fuse.model.families.weights import EMBEDDING, OUTPUT, WeightBlock
from megatron_fuse.model.weight_blocks import weight_blocks
from megatron_fuse.model.weight_files import DTYPES, write_weight_files
from megatron_fuse.storage.recorded_directory import directory_then_rename, sole_writer

logger = logging.getLogger(__name__)

_OTHER_MODEL = "Name the Hugging Face directory that the model was made from."
SHARD_BYTES = 5_000_000_000  # transformers' own limit


@dataclass(frozen=True)
class WholeParameters:
    """All parameters of a model, each as one process holds it at TP = 1.

    names: their names in a GPTModel, with the layers counted over the whole model.
    read(name): one parameter, of any float dtype, on any device.
    origin: where they are, for messages.
    """

    names: Sequence[str]
    read: Callable[[str], Tensor]
    origin: str


def assembled(parameters: WholeParameters, architecture: Architecture) -> Callable[[str], Tensor]:
    """A function that makes the tensor of a Hugging Face name, on the CPU, in the dtype of its parameter.

    Ask for each tensor once, in the order of hugging_face_shapes: each parameter is then read once. Raises
    UserError if a parameter is missing or unknown, before anything is read. The function raises UserError for
    a parameter of another shape.
    """
    shapes = hugging_face_shapes(architecture)
    blocks_of = {name: _blocks(name, parameters, architecture) for name in parameters.names}
    parts: dict[str, list[tuple[str, WeightBlock]]] = {name: [] for name in shapes}
    for name, blocks in blocks_of.items():
        for block in blocks:
            parts[block.tensor].append((name, block))
    for missing, found in parts.items():
        if sum(block.size for _, block in found) < (shapes[missing][found[0][1].dim] if found else 1):
            raise UserError(
                f"{parameters.origin} does not hold all of {missing}, which {architecture.origin} needs. "
                f"{_OTHER_MODEL}"
            )
    tensors_left = Counter(name for found in parts.values() for name in {name for name, _ in found})
    held: dict[str, Tensor] = {}

    def parameter(name: str) -> Tensor:
        if name not in held:
            held[name] = parameters.read(name)
            _check_shape(name, list(held[name].shape), blocks_of[name], shapes, parameters.origin)
        return held[name]

    def tensor(name: str) -> Tensor:
        result: Tensor | None = None
        for source, block in parts[name]:
            values = parameter(source).narrow(block.dim, block.at, block.size)
            if result is None:
                result = torch.empty(shapes[name], dtype=values.dtype)
            result.narrow(block.dim, block.start, block.size).copy_(values)
        for source in {source for source, _ in parts[name]}:
            tensors_left[source] -= 1
            if not tensors_left[source]:
                del held[source]
        assert result is not None  # every tensor has parts, see above
        return result

    return tensor


def _blocks(name: str, parameters: WholeParameters, architecture: Architecture) -> list[WeightBlock]:
    try:
        return weight_blocks(name, architecture, 0, 1)
    except KeyError as error:
        raise UserError(
            f"{parameters.origin} holds {name}, which {architecture.family} of {architecture.origin} does "
            f"not have. {_OTHER_MODEL}"
        ) from error


def _check_shape(
    name: str,
    shape: list[int],
    blocks: list[WeightBlock],
    shapes: Mapping[str, tuple[int, ...]],
    origin: str,
) -> None:
    """Raises UserError if a parameter does not have the shape that its blocks need."""
    dim = blocks[0].dim
    wanted = list(shapes[blocks[0].tensor])
    wanted[dim] = sum(block.size for block in blocks)
    if blocks[0].tensor in (EMBEDDING, OUTPUT) and shape[dim] > wanted[dim]:
        wanted[dim] = shape[dim]  # the padding of the vocabulary depends on the program that wrote it
    if shape != wanted:
        raise UserError(f"{name} of {origin} has shape {shape}, but {wanted} is needed. {_OTHER_MODEL}")


@contextmanager
def new_model_directory(output: Path) -> Iterator[Path]:
    """Yields a temporary directory that gets the name `output` if the block ends without an error.

    Raises UserError if output already exists or cannot be written.
    """
    with sole_writer(output, "config.json"):
        if output.exists():
            raise UserError(f"{output} already exists. Remove it or choose another directory.")
        with directory_then_rename(output) as temporary:
            yield temporary


def write_hugging_face_files(
    parameters: WholeParameters,
    reference: Path,
    directory: Path,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model into an empty directory: safetensors, config, tokenizer, chat template.

    reference: the model that the target was made from, which gives the architecture. All files but the
        weights are copied from it, and its config gets `dtype` (fp32, bf16 or fp16).
    shard_bytes: the most bytes of a file of weights, which is also the most memory for tensors of the output.

    Raises UserError for an unknown dtype, for values that it cannot hold, and as `assembled` does.
    """
    if dtype not in DTYPES:
        raise UserError(f"the export dtype is {dtype!r}. Choose one of {', '.join(DTYPES)}.")
    architecture = read_architecture(reference)
    exact_tensor, rounded = assembled(parameters, architecture), 0

    def tensor(name: str) -> Tensor:
        nonlocal rounded
        exact, place = exact_tensor(name), f"{name} of {parameters.origin}"
        refuse_non_finite(exact, place)
        written = exact.to(DTYPES[dtype])
        if not written.isfinite().all():
            raise UserError(
                f"{place} has values up to {exact.abs().max():g}, which {dtype} cannot hold. Export it as "
                "bf16 or fp32."
            )
        rounded += not torch.equal(written.to(exact.dtype), exact)
        return written

    shapes = hugging_face_shapes(architecture)
    write_weight_files(directory, shapes, tensor, DTYPES[dtype], shard_bytes)
    if rounded:
        logger.warning(
            f"{rounded} of {len(shapes)} tensors are rounded to {dtype}: fp32 keeps what the checkpoint holds"
        )
    write_beside_weights(reference, directory, dtype)
