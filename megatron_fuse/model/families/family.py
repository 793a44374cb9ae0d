"""What a model family is: one entry of data, from which reading, conversion and the layer spec follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from megatron_fuse.model.config_file import MOST_LAYERS, ModelConfig
from megatron_fuse.model.families.weights import Table, llama_layer

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture

# The upper bounds are far above any published model. A larger value is a mistake, and would fill the memory
# before it is noticed.
Width = Annotated[int, Field(ge=1, le=2**24)]
Heads = Annotated[int, Field(ge=1, le=2**16)]
Positions = Annotated[int, Field(ge=1, le=2**31 - 1)]


class TargetConfig(ModelConfig):
    """config.json of a target: the keys of a Llama.

    A key is required if transformers would silently replace it by a default of its own.
    """

    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)] | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Annotated[float, Field(ge=1e-30, le=1)]
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)] | None = None
    layer_types: list[str] | None = None
    initializer_range: Annotated[float, Field(ge=0, le=1)] | None = None
    # These keys would make another model of the same class, which is not supported.
    is_causal: Literal[True] | None = None
    per_layer_config: None = None
    quantization_config: None = None


@dataclass(frozen=True)
class Need:
    """The values of a config's key that a family supports. words: how a message names them."""

    values: tuple[Any, ...]
    words: str


SILU = Need(("silu",), "'silu'")
NO_BIAS = Need((False, None), "false (biases are supported on Qwen2's query, key and value only)")
LLAMA_NEEDS = {"hidden_act": SILU, "attention_bias": NO_BIAS, "mlp_bias": NO_BIAS}


def no_traits(config: PreTrainedConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One Hugging Face class: what it has beyond a Llama, and what of it is not supported.

    The layers themselves follow from the fields of Architecture. `traits` sets those that a Llama has not.
    """

    name: str  # the Hugging Face class, e.g. "LlamaForCausalLM"
    model_type: str
    layer: Callable[[Architecture], Table] = llama_layer
    # From transformers' config to the fields of Architecture that differ from a Llama's.
    traits: Callable[[PreTrainedConfig], dict[str, Any]] = no_traits
    # Which layers have the config's sliding_window: none, all, or those that layer_types names.
    windows: Literal["none", "all", "by layer_types"] = "none"
    # Whether the class rotates only partial_rotary_factor of the channels.
    partial_rotary: bool = False
    # Whether rope_parameters has one entry for each kind of layer.
    rope_by_layer_type: bool = False
    config: type[TargetConfig] = TargetConfig
    needs: Mapping[str, Need] = field(default_factory=lambda: LLAMA_NEEDS)
