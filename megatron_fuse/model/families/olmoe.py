"""OLMoE: experts in every layer, and norms of queries and keys over all heads."""

from megatron_fuse.model.families.family import LLAMA_NEEDS, Family, Need
from megatron_fuse.model.families.mixture import MixtureConfig, mixture, mixture_traits
from megatron_fuse.model.families.weights import attention, norms_before, norms_over_all_heads

OLMOE = Family(
    "OlmoeForCausalLM",
    "olmoe",
    layer=lambda a: {
        **attention(a),
        **norms_before(a),
        **norms_over_all_heads(a),
        **mixture(a, "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    },
    traits=lambda config: {**mixture_traits(config), "query_key_norm": "all heads"},
    config=MixtureConfig,
    needs={
        **LLAMA_NEEDS,
        "clip_qkv": Need((None,), "null"),
        "sliding_window": Need((None,), "null"),
    },
)
