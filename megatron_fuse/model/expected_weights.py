"""The tensors of a Hugging Face checkpoint of an architecture,
and the check that a directory's weight files hold them.

This needs neither Megatron nor memory for a model: names, shapes and dtypes are in the headers of the files.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.families import layer_weights
from megatron_fuse.model.families.weights import EMBEDDING, OUTPUT, outside_layers
from megatron_fuse.model.weight_files import DTYPES, WeightFiles
from megatron_fuse.text_safety import brief

# Buffers that transformers wrote before 2023. Their values follow from the config.
IGNORED_TENSORS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def hugging_face_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face checkpoint of this architecture, layer by layer."""
    embedding, *last = outside_layers(architecture).values()
    in_layer = [weight.shapes() for weight in layer_weights(architecture).values()]
    shapes = embedding.shapes()
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}": shape for part in in_layer for name, shape in part.items()}
    for weight in last:
        shapes |= weight.shapes()
    return shapes


def check_weights(files: WeightFiles, architecture: Architecture) -> None:
    """Raises UserError, which names the tensor, for a missing or unexpected tensor,
    and for a wrong shape or dtype."""
    where, config = files.model_dir, architecture.origin
    if architecture.num_layers > len(files.file_of):
        raise UserError(
            f"{config}: num_hidden_layers is {architecture.num_layers}, but there are only "
            f"{len(files.file_of)} tensors of weights. The weights belong to another config or are not "
            "complete: fetch the model again."
        )
    expected = hugging_face_shapes(architecture)
    stored_names = {name for name in files.file_of if not IGNORED_TENSORS.fullmatch(name)}
    tied_twice = architecture.tied_embeddings and {EMBEDDING, OUTPUT} <= stored_names
    if missing := sorted(expected.keys() - stored_names):
        raise UserError(
            f"{where} does not have {_first(missing)}, which {config} needs ({_sizes(architecture)}). Fetch "
            "the model again."
        )
    if unexpected := sorted(stored_names - expected.keys() - ({OUTPUT} if tied_twice else set())):
        raise UserError(
            f"{where} holds {_first(unexpected)}, but {architecture.family} of {config} does not have it "
            f"({_sizes(architecture)}). Fetch the model again."
        )
    for name, shape in (expected | ({OUTPUT: expected[EMBEDDING]} if tied_twice else {})).items():
        if (stored := files.shape(name)) != shape:
            raise UserError(
                f"{name} in {where} has shape {list(stored)}, but {config} needs {list(shape)} "
                f"({_sizes(architecture)}). The weights belong to another config: fetch the model again."
            )
        if (dtype := files.dtype(name)) not in DTYPES:
            raise UserError(
                f"{files.place(name)} is {dtype}, but the weights of a target must be {', '.join(DTYPES)}. "
                "Load the model with transformers, dequantise it and save it again."
            )
    if tied_twice:  # some checkpoints store the tied weight under both names
        embedding, output = (
            files.read(name, 0, 0, architecture.vocab_size).float() for name in (EMBEDDING, OUTPUT)
        )
        if not torch.equal(embedding, output):
            raise UserError(
                f"{where}: {OUTPUT} differs from {EMBEDDING}. Set tie_word_embeddings to false in {config}."
            )


def _sizes(architecture: Architecture) -> str:
    """The sizes that decide names and shapes, by the config's keys, for messages."""
    a = architecture
    return (
        f"vocab_size {a.vocab_size}, hidden_size {a.hidden_size}, intermediate_size {a.ffn_hidden_size}, "
        f"num_hidden_layers {a.num_layers}, num_attention_heads {a.num_attention_heads}, num_key_value_heads "
        f"{a.num_query_groups}, head_dim {a.head_dim}, tie_word_embeddings {str(a.tied_embeddings).lower()}"
    )


def _first(names: Iterable[str]) -> str:
    first, *others = names
    first = brief(first, 100)
    return f"{first} and {len(others)} more tensors" if others else f"the tensor {first}"


def refuse_non_finite(values: Tensor, place: str) -> None:
    """Raises UserError if a weight is NaN or infinite.
    place: file and name of the tensor, for the message."""
    # One pass: the minimum or the maximum is not finite if any value is not,
    # as both are NaN if a value is NaN.
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
        raise UserError(
            f"{place} holds NaN or infinite weights: the file is damaged, or the training had diverged "
            "before it was saved. Fetch the file again, or use an earlier model."
        )
