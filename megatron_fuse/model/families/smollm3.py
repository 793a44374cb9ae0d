"""SmolLM3: a Llama, some of whose layers do not rotate. Those may have a window."""

from typing import Any, Literal, Self

from pydantic import model_validator
from transformers import PreTrainedConfig

from megatron_fuse.model.families.family import Family, TargetConfig


class SmolLM3Config(TargetConfig):
    no_rope_layers: list[Literal[0, 1]] | None = None  # 1: the layer rotates

    @model_validator(mode="after")
    def _check_every_layer_is_listed(self) -> Self:
        if self.no_rope_layers is not None and len(self.no_rope_layers) < self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers has {len(self.no_rope_layers)} values, but num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        return self


def _traits(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rotated_layers": tuple(map(bool, config.no_rope_layers[: config.num_hidden_layers]))}


SMOLLM3 = Family(
    "SmolLM3ForCausalLM", "smollm3", traits=_traits, windows="by layer_types", config=SmolLM3Config
)
