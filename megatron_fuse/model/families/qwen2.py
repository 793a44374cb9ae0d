"""Qwen2 and Qwen2.5: biases of query, key and value; windows in some layers."""

from megatron_fuse.model.families.family import Family

QWEN2 = Family(
    "Qwen2ForCausalLM", "qwen2", traits=lambda config: {"qkv_bias": True}, windows="by layer_types"
)
