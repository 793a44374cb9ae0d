"""Qwen3, dense: a norm of the queries and keys of each head, windows in some layers, no biases."""

from megatron_fuse.model.families.family import Family
from megatron_fuse.model.families.weights import llama_layer, query_and_key_norms

QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    layer=lambda a: {**llama_layer(a), **query_and_key_norms(a)},
    traits=lambda config: {"query_key_norm": "per head"},
    windows="by layer_types",
)
