"""Qwen3, mixtures of experts: experts in every layer, and a norm of the queries and keys of each head."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from megatron_fuse.model.families.family import LLAMA_NEEDS, Family, Need, Width
from megatron_fuse.model.families.mixture import MixtureConfig, mixture, mixture_traits
from megatron_fuse.model.families.weights import attention, norms_before, query_and_key_norms


class Qwen3MoeConfig(MixtureConfig):
    moe_intermediate_size: Width


def _traits(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        **mixture_traits(config),
        "query_key_norm": "per head",
        "ffn_hidden_size": config.moe_intermediate_size,
    }


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    layer=lambda a: {
        **attention(a),
        **norms_before(a),
        **query_and_key_norms(a),
        **mixture(a, "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    },
    traits=_traits,
    windows="all",
    config=Qwen3MoeConfig,
    needs={
        **LLAMA_NEEDS,
        "decoder_sparse_step": Need((1,), "1 (layers without experts are not supported)"),
        "mlp_only_layers": Need(([], None), "[] (layers without experts are not supported)"),
    },
)
