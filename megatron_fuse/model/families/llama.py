"""Llama 1 to 3.2, and models that were published as Llamas, such as Vicuna and SmolLM2."""

from megatron_fuse.model.families.family import Family

LLAMA = Family("LlamaForCausalLM", "llama")
