"""Mistral 7B and Mistral Small: a Llama, whose layers may all have a window."""

from megatron_fuse.model.families.family import Family

MISTRAL = Family("MistralForCausalLM", "mistral", windows="all")
