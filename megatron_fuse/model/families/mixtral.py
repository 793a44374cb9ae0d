"""Mixtral: a Mistral with experts. The weights of a token's experts add up to 1."""

from megatron_fuse.model.families.family import LLAMA_NEEDS, Family, Need
from megatron_fuse.model.families.mixture import MixtureConfig, experts, mixture
from megatron_fuse.model.families.weights import attention, norms_before

MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    layer=lambda a: {
        **attention(a),
        **norms_before(a),
        **mixture(a, "block_sparse_moe", gate="w1", up="w3", down="w2"),
    },
    traits=lambda config: {"experts": experts(config, normalized=True)},
    windows="all",
    config=MixtureConfig,
    needs={**LLAMA_NEEDS, "router_jitter_noise": Need((0, None), "0 (noise on the router's input)")},
)
