"""Gemma 3, text: a Gemma with norms of the queries and keys of each head, whose layers with a window have
rotations of their own.
"""

from megatron_fuse.model.families.family import Family
from megatron_fuse.model.families.gemma import GEMMA_NEEDS, GemmaConfig, gemma_layer, gemma_traits
from megatron_fuse.model.families.weights import query_and_key_norms

# attn_logit_softcapping is not refused: the attention of this class does not read it.
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    layer=lambda a: {**gemma_layer(a), **query_and_key_norms(a)},
    traits=lambda config: {**gemma_traits(config), "query_key_norm": "per head"},
    windows="by layer_types",
    rope_by_layer_type=True,
    config=GemmaConfig,
    needs=GEMMA_NEEDS,
)
