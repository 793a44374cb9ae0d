"""Weights between a Hugging Face model directory and this rank's part of a GPTModel, at any TP x PP x virtual
PP.

One table (`families/weights.py`) says which rectangles of which Hugging Face tensors make up a Megatron
parameter. Loading copies the rectangles in one direction, exporting in the other. Nothing is computed, so
that a round trip returns every bit.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, read_architecture
from megatron_fuse.model.carried_files import write_beside_weights
from megatron_fuse.model.expected_weights import (
    check_weights,
    hugging_face_shapes,
    refuse_non_finite,
)
from megatron_fuse.model.families import layer_weights
from megatron_fuse.model.families.weights import WeightBlock, outside_layers
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.model.weight_files import DTYPES, WeightFiles, write_weight_files
from megatron_fuse.storage.recorded_directory import directory_then_rename, sole_writer

logger = logging.getLogger(__name__)


# The names under Transformer Engine, which computes a norm with the matrix after it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def weight_blocks(
    parameter: str, architecture: Architecture, tensor_rank: int, tensor_size: int
) -> list[WeightBlock]:
    """The blocks of one Megatron parameter on one tensor-parallel rank.

    parameter: its name in a GPTModel of the local or the Transformer Engine layer spec, with the layer
    counted over the whole model. Rows of the vocabulary's padding belong to no block. Raises KeyError for a
    name that FusionGPTModel does not have.
    """
    if not (in_layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)):
        return list(outside_layers(architecture)[parameter].blocks(tensor_rank, tensor_size))
    layer, name = in_layer.groups()
    weight = layer_weights(architecture)[_FUSED_NORMS.get(name, name)]
    return [
        replace(block, tensor=f"model.layers.{layer}.{block.tensor}")
        for block in weight.blocks(tensor_rank, tensor_size)
    ]


@torch.no_grad()
def load_hugging_face_weights(model_chunks: Sequence[torch.nn.Module], model_dir: str | os.PathLike) -> None:
    """Fills this rank's parameters from the weight files of a Hugging Face model directory.

    model_chunks: FusionGPTModels, bare or wrapped (Float16Module, DistributedDataParallel). Call this before
    the optimizer copies the parameters. Values are cast to each parameter's dtype; rows of the vocabulary's
    padding become zero. No collectives. Raises UserError, the same on every rank, which names a missing or
    unexpected tensor, or one of a wrong shape.
    """
    files = WeightFiles(model_dir)
    chunks = [_bare(chunk) for chunk in model_chunks]
    check_weights(files, chunks[0].architecture)
    for chunk in chunks:
        for parameter, blocks in parameter_blocks(chunk):
            # If the blocks do not cover the parameter, the rest is padding of the vocabulary.
            if sum(block.size for block in blocks) < parameter.shape[blocks[0].dim if blocks else 0]:
                parameter.zero_()
            for block in blocks:
                values = files.read(block.tensor, block.dim, block.start, block.size)
                refuse_non_finite(values, files.place(block.tensor))
                parameter.narrow(block.dim, block.at, block.size).copy_(values)


def hugging_face_state_dict(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All weights of a whole model (TP=1, PP=1) by transformers' names, on the CPU,
    without the vocabulary's padding.

    dtype: None keeps the dtype of each parameter.
    Raises ValueError if this rank does not hold the whole model.
    """
    tensor = _assembler(model, dtype)
    return {name: tensor(name) for name in hugging_face_shapes(_bare(model).architecture)}


def save_hugging_face_model(
    model: torch.nn.Module,
    reference_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    dtype: str = "bf16",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """write_hugging_face_model into a directory that gets its name only when it is complete.

    Also raises UserError if output_dir already exists or cannot be written.
    """
    output = Path(output_dir)
    with sole_writer(output, "config.json"):
        if output.exists():
            raise UserError(f"{output} already exists. Remove it or choose another directory.")
        with directory_then_rename(output) as temporary:
            write_hugging_face_model(model, Path(reference_dir), temporary, dtype, shard_bytes)


def write_hugging_face_model(
    model: torch.nn.Module,
    reference: Path,
    directory: Path,
    dtype: str,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a whole model (TP=1, PP=1) into an empty directory: safetensors, config, tokenizer, chat
    template.

    reference: the model that the target was made from. All files but the weights are copied from it, and its
        config gets `dtype` (fp32, bf16 or fp16).

    Raises UserError for an unknown dtype, for values that it cannot hold, and for a reference of another
    architecture.
    """
    if dtype not in DTYPES:
        raise UserError(f"the export dtype is {dtype!r}. Choose one of {', '.join(DTYPES)}.")
    architecture, theirs = _bare(model).architecture, read_architecture(reference)
    for field in fields(architecture):
        ours, other = getattr(architecture, field.name), getattr(theirs, field.name)
        if field.compare and ours != other:
            raise UserError(
                f"the model to export has {field.name} {ours!r}, but {theirs.origin} has {other!r}. Name the "
                "directory that the target was made from."
            )
    assembled, rounded = _assembler(model, None), 0

    def tensor(name: str) -> Tensor:
        nonlocal rounded
        exact = assembled(name)
        refuse_non_finite(exact, f"{name} of the model to export")
        written = exact.to(DTYPES[dtype])
        if not written.isfinite().all():
            raise UserError(
                f"{name} of the model to export has values up to {exact.abs().max():g}, which {dtype} cannot "
                "hold. Export it as bf16 or fp32."
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


def _bare(model: torch.nn.Module) -> FusionGPTModel:
    while not isinstance(model, FusionGPTModel):
        model = model.get_submodule("module")
    return model


def parameter_blocks(model: FusionGPTModel) -> Iterator[tuple[Tensor, list[WeightBlock]]]:
    """Yields every parameter of this rank's bare model chunk, with its blocks."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in model.named_parameters():
        if in_layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            # Names count the layers of a chunk from 0. layer_number counts the layers of the whole model from
            # 1.
            layer = model.decoder.layers[int(in_layer[1])].layer_number - 1
            name = f"decoder.layers.{layer}.{in_layer[2]}"
        yield parameter, weight_blocks(name, model.architecture, rank, size)


def _assembler(model: torch.nn.Module, dtype: torch.dtype | None) -> Callable[[str], Tensor]:
    """A function that makes the tensor of a Hugging Face name, on the CPU. So an export has few tensors in
    memory at a time."""
    bare = _bare(model)
    if (
        not (bare.pre_process and bare.post_process)
        or parallel_state.get_tensor_model_parallel_world_size() > 1
    ):
        raise ValueError(
            "only a whole model (TP=1, PP=1) can be exported: load its checkpoint in one process first"
        )
    shapes = hugging_face_shapes(bare.architecture)
    sources: dict[str, list[tuple[Tensor, WeightBlock]]] = {name: [] for name in shapes}
    for parameter, blocks in parameter_blocks(bare):
        for block in blocks:
            sources[block.tensor].append((parameter.detach(), block))

    def tensor(name: str) -> Tensor:
        blocks = sources[name]
        result = torch.empty(shapes[name], dtype=dtype or blocks[0][0].dtype)
        for parameter, block in blocks:
            rows = parameter.narrow(block.dim, block.at, block.size)
            result.narrow(block.dim, block.start, block.size).copy_(rows)
        return result

    return tensor
