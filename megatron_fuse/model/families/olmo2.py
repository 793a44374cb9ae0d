"""OLMo 2: norms after attention and MLP instead of before, and norms of queries and keys over all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fuse.model.families.family import LLAMA_NEEDS, Family, Need
from megatron_fuse.model.families.weights import Table, head_widths, norms_after, projections, rows

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture


def _layer(a: Architecture) -> Table:
    query, key, _ = head_widths(a)
    return {
        **projections(a),
        "self_attention.q_layernorm.weight": rows("self_attn.q_norm.weight", query),
        "self_attention.k_layernorm.weight": rows("self_attn.k_norm.weight", key),
        **norms_after(a),
    }


OLMO2 = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    layer=_layer,
    traits=lambda config: {
        "norms_before": False,
        "norms_after": True,
        "query_key_norm": "all heads",
    },
    needs={**LLAMA_NEEDS, "clip_qkv": Need((None,), "null")},
)
