"""Which rectangles of which Hugging Face tensors make up a Megatron parameter, on any tensor rank."""

import re
from dataclasses import replace

from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.families import layer_weights
from megatron_fuse.model.families.weights import WeightBlock, outside_layers

# The names under Transformer Engine, which computes a norm with the matrix after it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def is_of_expert(parameter: str) -> bool:
    """Whether a parameter belongs to one expert, and is split over the tensor-parallel ranks of experts."""
    return ".experts." in parameter


def weight_blocks(
    parameter: str, architecture: Architecture, tensor_rank: int, tensor_size: int
) -> list[WeightBlock]:
    """The blocks of one Megatron parameter on one tensor-parallel rank, or on one of an expert's ranks.

    parameter: its name in a GPTModel of the local or the Transformer Engine layer spec, with the layer
    and the expert counted over the whole model. Rows of the vocabulary's padding belong to no block. Raises
    KeyError for a name that FusionGPTModel does not have.
    """
    if not (in_layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)):
        return list(outside_layers(architecture)[parameter].blocks(tensor_rank, tensor_size))
    layer, name = in_layer.groups()
    weight = layer_weights(architecture)[_FUSED_NORMS.get(name, name)]
    return [
        replace(block, tensor=f"model.layers.{layer}.{block.tensor}")
        for block in weight.blocks(tensor_rank, tensor_size)
    ]
