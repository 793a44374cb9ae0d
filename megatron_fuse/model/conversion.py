"""Weights between a Hugging Face model directory and this rank's part of a GPTModel, at any TP x PP x virtual
PP.

One table (`families/weights.py`) says which rectangles of which Hugging Face tensors make up a Megatron
parameter. Loading copies the rectangles in one direction, exporting in the other (hugging_face_files.py).
Nothing is computed, so that a round trip returns every bit.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.expected_weights import check_weights, hugging_face_shapes, refuse_non_finite
from megatron_fuse.model.families.weights import WeightBlock
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.model.hugging_face_files import (
    SHARD_BYTES,
    WholeParameters,
    assembled,
    new_model_directory,
    write_hugging_face_files,
)
from megatron_fuse.model.weight_blocks import is_of_expert, weight_blocks
from megatron_fuse.model.weight_files import WeightFiles


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


def hugging_face_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """All weights of a whole model (TP=1, PP=1) by transformers' names, on the CPU, each in the dtype of its
    parameter, without the vocabulary's padding.

    Raises ValueError if this rank does not hold the whole model.
    """
    architecture = _bare(model).architecture
    tensor = assembled(whole_parameters(model), architecture)
    return {name: tensor(name) for name in hugging_face_shapes(architecture)}


def whole_parameters(model: torch.nn.Module) -> WholeParameters:
    """The parameters of a whole model (TP=1, PP=1). Raises ValueError if this rank does not hold it."""
    bare = _bare(model)
    if (
        not (bare.pre_process and bare.post_process)
        or parallel_state.get_tensor_model_parallel_world_size() > 1
        or parallel_state.get_expert_model_parallel_world_size() > 1
    ):
        raise ValueError(
            "only a whole model (TP=1, PP=1, EP=1) can be exported: load its checkpoint in one process first"
        )
    parameters = {name: parameter.detach() for name, parameter in _named_parameters(bare)}
    return WholeParameters(list(parameters), parameters.__getitem__, "the model to export")


def save_hugging_face_model(
    model: torch.nn.Module,
    reference_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    dtype: str = "bf16",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a whole model in memory (TP=1, PP=1) as a new Hugging Face directory, as
    write_hugging_face_files does.

    Also raises UserError for a reference of another architecture.
    """
    ours, theirs = _bare(model).architecture, read_architecture(reference_dir)
    for field in fields(ours):
        value, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.compare and value != other:
            raise UserError(
                f"the model to export has {field.name} {value!r}, but {theirs.origin} has {other!r}. Name "
                "the directory that the target was made from."
            )
    with new_model_directory(Path(output_dir)) as temporary:
        write_hugging_face_files(whole_parameters(model), Path(reference_dir), temporary, dtype, shard_bytes)


def _bare(model: torch.nn.Module) -> FusionGPTModel:
    while not isinstance(model, FusionGPTModel):
        model = model.get_submodule("module")
    return model


def parameter_blocks(model: FusionGPTModel) -> Iterator[tuple[Tensor, list[WeightBlock]]]:
    """Yields every parameter of this rank's bare model chunk, with its blocks."""
    tensor = parallel_state.get_tensor_model_parallel_group()
    expert_tensor = parallel_state.get_expert_tensor_parallel_group()
    for name, parameter in _named_parameters(model):
        group = expert_tensor if is_of_expert(name) else tensor
        yield parameter, weight_blocks(name, model.architecture, group.rank(), group.size())


def _named_parameters(model: FusionGPTModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of a bare model chunk by name, with layers and experts counted over the whole
    model.
    """
    for name, parameter in model.named_parameters():
        if in_layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            # Names count the layers of a chunk from 0. layer_number counts the layers of the whole model from
            # 1.
            layer = model.decoder.layers[int(in_layer[1])]
            name = f"decoder.layers.{layer.layer_number - 1}.{_with_whole_count(in_layer[2], layer)}"
        yield name, parameter


# Of the local layers: one module for each expert of the rank. Of Transformer Engine: one parameter for each.
_OF_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<number>\d+)\.)?(?P<matrix>linear_fc[12])\.weight(?P<grouped>\d*)"
)


def _with_whole_count(name: str, layer: torch.nn.Module) -> str:
    """The name of a layer's parameter, with an expert counted over the whole model and not on this rank."""
    if not (of_expert := _OF_EXPERT.fullmatch(name)):
        return name
    own = int(of_expert["number"] or of_expert["grouped"])
    expert = layer.get_submodule("mlp").local_expert_indices[own]  # type: ignore[index]
    return f"mlp.experts.local_experts.{expert}.{of_expert['matrix']}.weight"
