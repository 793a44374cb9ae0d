"""Phi-3 and Phi-4-mini: one tensor for query, key and value, one for gate and up; partial rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fuse.model.families.family import LLAMA_NEEDS, Family, Need
from megatron_fuse.model.families.weights import (
    Table,
    Weight,
    fused,
    head_widths,
    llama_layer,
    query_key_value,
)

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture

_NO_DROPOUT = Need((0, None), "0 (a target has no dropout)")


def _layer(a: Architecture) -> Table:
    query_key_and_value = fused("self_attn.qkv_proj.weight", *head_widths(a))
    gate_and_up = fused("mlp.gate_up_proj.weight", a.ffn_hidden_size, a.ffn_hidden_size)
    return {
        **llama_layer(a),
        "self_attention.linear_qkv.weight": query_key_value(a, query_key_and_value, a.hidden_size),
        "mlp.linear_fc1.weight": Weight(gate_and_up, (a.hidden_size,)),
    }


PHI3 = Family(
    "Phi3ForCausalLM",
    "phi3",
    layer=_layer,
    windows="all",
    partial_rotary=True,
    needs={**LLAMA_NEEDS, "resid_pdrop": _NO_DROPOUT},
)
