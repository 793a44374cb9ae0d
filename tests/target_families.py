"""For every family of a target: the class of its config, and what it has beyond the sizes of a Llama."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "qwen3": (
        Qwen3Config,
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "smollm3": (
        SmolLM3Config,
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6, "pad_token_id": None},
    ),
    "phi3": (
        Phi3Config,
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5, 3.0],
                "long_factor": [1.0, 4.0, 16.0],
                "partial_rotary_factor": 0.75,
            },
            "original_max_position_embeddings": 64,
            "sliding_window": 6,
            "pad_token_id": None,
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
_EIGHT = {"num_experts": 8, "num_experts_per_tok": 3}
MIXTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 12, "moe_intermediate_size": 20, "norm_topk_prob": True} | _EIGHT,
    ),
    "olmoe": (OlmoeConfig, {"pad_token_id": None, "eos_token_id": 2} | _EIGHT),
}
