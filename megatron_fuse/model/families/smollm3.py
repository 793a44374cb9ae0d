"""SmolLM3: a Llama, some of whose layers do not rotate. Those may have a window."""

from typing import Any

from transformers import PreTrainedConfig

from megatron_fuse.model.families.family import Family, TargetConfig


class SmolLM3Config(TargetConfig):
    no_rope_layers: list[int] | None = None  # 1: the layer rotates


def _traits(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rotated_layers": tuple(map(bool, config.no_rope_layers[: config.num_hidden_layers]))}


SMOLLM3 = Family(
    "SmolLM3ForCausalLM", "smollm3", traits=_traits, windows="by layer_types", config=SmolLM3Config
)
