"""What Gemma 2 and Gemma 3 share: scaled embeddings, norms that scale by 1 + weight, four norms a layer,
GeGLU, an attention scale of their own, and windows in most layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from megatron_fuse.model.families.family import NO_BIAS, Need, Positions, TargetConfig
from megatron_fuse.model.families.weights import Table, norms_after, projections, whole

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture

Cap = Annotated[float, Field(ge=1e-3, le=1e6)]


class GemmaConfig(TargetConfig):
    head_dim: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)]
    sliding_window: Positions
    query_pre_attn_scalar: Annotated[float, Field(ge=1e-3, le=1e9)]
    final_logit_softcapping: Cap | None = None
    use_bidirectional_attention: Literal[False] | None = None


GEMMA_NEEDS = {
    "hidden_activation": Need(("gelu_pytorch_tanh",), "'gelu_pytorch_tanh'"),
    "attention_bias": NO_BIAS,
}


def gemma_layer(a: Architecture) -> Table:
    return {
        **projections(a),
        "input_layernorm.weight": whole("input_layernorm.weight", a.hidden_size),
        "pre_mlp_layernorm.weight": whole("pre_feedforward_layernorm.weight", a.hidden_size),
        **norms_after(a),
    }


def gemma_traits(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "activation": "gelu_tanh",
        "norms_after": True,
        "zero_centered_norms": True,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "logit_softcap": config.final_logit_softcapping,
        "embedding_scale": config.hidden_size**0.5,
    }
