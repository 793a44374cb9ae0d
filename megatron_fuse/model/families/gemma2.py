"""Gemma 2: a Gemma with soft caps of the attention scores and of the logits."""

from typing import Any

from transformers import PreTrainedConfig

from megatron_fuse.model.families.family import Family
from megatron_fuse.model.families.gemma import (
    GEMMA_NEEDS,
    Cap,
    GemmaConfig,
    gemma_layer,
    gemma_traits,
)


class Gemma2Config(GemmaConfig):
    attn_logit_softcapping: Cap | None = None


def _traits(config: PreTrainedConfig) -> dict[str, Any]:
    return {**gemma_traits(config), "attention_softcap": config.attn_logit_softcapping}


GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    layer=gemma_layer,
    traits=_traits,
    windows="by layer_types",
    config=Gemma2Config,
    needs=GEMMA_NEEDS,
)
