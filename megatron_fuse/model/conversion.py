"""Weights between a Hugging Face model directory and this rank's part of a GPTModel, at any TP x PP x virtual
PP.

One table, `weight_blocks`, says which rectangles of which Hugging Face tensors make up a Megatron parameter.
Loading copies the rectangles in one direction, exporting in the other. Nothing is computed, so that a round
trip returns every bit.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, read_architecture
from megatron_fuse.model.carried_files import write_beside_weights
from megatron_fuse.model.expected_weights import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    check_weights,
    hugging_face_shapes,
    refuse_non_finite,
)
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.model.weight_files import DTYPES, WeightFiles, write_weight_files
from megatron_fuse.storage.recorded_directory import directory_then_rename, sole_writer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightBlock:
    """A rectangle that a Hugging Face tensor and a Megatron parameter share.

    It covers every dimension but `dim` completely.
    """

    tensor: str  # name of the Hugging Face tensor
    dim: int
    start: int  # first element along `dim` in the Hugging Face tensor
    at: int  # first element along `dim` in the Megatron parameter
    size: int  # elements along `dim`


def weight_blocks(
    parameter: str, architecture: Architecture, tensor_rank: int, tensor_size: int
) -> list[WeightBlock]:
    """The blocks of one Megatron parameter on one tensor-parallel rank.

    parameter: its name in a GPTModel of the local or the Transformer Engine layer spec, with the layer
    counted over the whole model. Rows of the vocabulary's padding belong to no block. Raises KeyError for a
    name that FusionGPTModel does not have.

    linear_qkv holds for each key/value group the group's query heads, its key and its value. linear_fc1 holds
    the rank's part of the gate, then its part of the up projection.
    """
    a = architecture

    def part(tensor: str, dim: int, length: int) -> list[WeightBlock]:
        share = length // tensor_size
        return [WeightBlock(tensor, dim, tensor_rank * share, 0, share)]

    def vocabulary(tensor: str) -> list[WeightBlock]:
        share = a.padded_vocab_size // tensor_size
        start = tensor_rank * share
        size = min(a.vocab_size - start, share)
        return [WeightBlock(tensor, 0, start, 0, size)] if size > 0 else []

    def query_key_value(prefix: str, kind: str) -> Iterator[WeightBlock]:
        # Megatron interleaves the groups; Hugging Face has three tensors, each with all groups in order.
        groups, d = a.num_query_groups // tensor_size, a.head_dim
        queries = a.num_attention_heads // a.num_query_groups * d
        at = 0
        for group in range(tensor_rank * groups, (tensor_rank + 1) * groups):
            for name, size in (("q_proj", queries), ("k_proj", d), ("v_proj", d)):
                yield WeightBlock(f"{prefix}self_attn.{name}.{kind}", 0, group * size, at, size)
                at += size

    def gate_and_up(prefix: str) -> list[WeightBlock]:
        share = a.ffn_hidden_size // tensor_size
        names = (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
        return [WeightBlock(name, 0, tensor_rank * share, i * share, share) for i, name in enumerate(names)]

    def whole(tensor: str) -> list[WeightBlock]:
        return [WeightBlock(tensor, 0, 0, 0, a.hidden_size)]

    if not (in_layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)):
        return {
            "embedding.word_embeddings.weight": lambda: vocabulary(EMBEDDING),
            "output_layer.weight": lambda: vocabulary(EMBEDDING if a.tied_embeddings else OUTPUT),
            "decoder.final_layernorm.weight": lambda: whole(FINAL_NORM),
        }[parameter]()
    prefix, name = f"model.layers.{in_layer[1]}.", in_layer[2]
    return {
        "input_layernorm.weight": lambda: whole(f"{prefix}input_layernorm.weight"),
        "self_attention.linear_qkv.layer_norm_weight": lambda: whole(f"{prefix}input_layernorm.weight"),
        "self_attention.linear_qkv.weight": lambda: list(query_key_value(prefix, "weight")),
        "self_attention.linear_qkv.bias": lambda: list(query_key_value(prefix, "bias")),
        "self_attention.linear_proj.weight": lambda: part(
            f"{prefix}self_attn.o_proj.weight", 1, a.num_attention_heads * a.head_dim
        ),
        "pre_mlp_layernorm.weight": lambda: whole(f"{prefix}post_attention_layernorm.weight"),
        "mlp.linear_fc1.layer_norm_weight": lambda: whole(f"{prefix}post_attention_layernorm.weight"),
        "mlp.linear_fc1.weight": lambda: gate_and_up(prefix),
        "mlp.linear_fc2.weight": lambda: part(f"{prefix}mlp.down_proj.weight", 1, a.ffn_hidden_size),
    }[name]()


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
