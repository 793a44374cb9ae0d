"""The supported model families, one file each. `FAMILIES` has them by Hugging Face class."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from megatron_fuse.model.families.family import Family
from megatron_fuse.model.families.gemma2 import GEMMA2
from megatron_fuse.model.families.gemma3 import GEMMA3
from megatron_fuse.model.families.llama import LLAMA
from megatron_fuse.model.families.mistral import MISTRAL
from megatron_fuse.model.families.mixtral import MIXTRAL
from megatron_fuse.model.families.olmo2 import OLMO2
from megatron_fuse.model.families.olmoe import OLMOE
from megatron_fuse.model.families.phi3 import PHI3
from megatron_fuse.model.families.qwen2 import QWEN2
from megatron_fuse.model.families.qwen3 import QWEN3
from megatron_fuse.model.families.qwen3_moe import QWEN3_MOE
from megatron_fuse.model.families.smollm3 import SMOLLM3
from megatron_fuse.model.families.weights import Table

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, PHI3, OLMO2, GEMMA2, GEMMA3)
_MIXTURES = (MIXTRAL, QWEN3_MOE, OLMOE)
FAMILIES: dict[str, Family] = {family.name: family for family in _DENSE + _MIXTURES}


@cache
def layer_weights(architecture: Architecture) -> Table:
    """The weight table of a layer. All layers of an architecture have the same."""
    return FAMILIES[architecture.family].layer(architecture)
