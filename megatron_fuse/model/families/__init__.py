"""The supported model families, one file each. `FAMILIES` has them by Hugging Face class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fuse.model.families.family import Family
from megatron_fuse.model.families.llama import LLAMA
from megatron_fuse.model.families.mistral import MISTRAL
from megatron_fuse.model.families.qwen2 import QWEN2
from megatron_fuse.model.families.weights import Table

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2)}


def layer_weights(architecture: Architecture) -> Table:
    """The weight table of a layer. All layers of an architecture have the same."""
    return FAMILIES[architecture.family].layer(architecture)
