"""OLMo 2: norms after attention and MLP instead of before, and norms of queries and keys over all heads."""

from megatron_fuse.model.families.family import LLAMA_NEEDS, Family, Need
from megatron_fuse.model.families.weights import norms_after, norms_over_all_heads, projections

OLMO2 = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    layer=lambda a: {**projections(a), **norms_over_all_heads(a), **norms_after(a)},
    traits=lambda config: {
        "norms_before": False,
        "norms_after": True,
        "query_key_norm": "all heads",
    },
    needs={**LLAMA_NEEDS, "clip_qkv": Need((None,), "null")},
)
