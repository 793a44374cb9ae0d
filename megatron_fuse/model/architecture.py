"""The architecture of the target: one frozen description, read from a Hugging Face config, and the checks of
a parallel layout.

Nothing here builds a model or needs Megatron,
so that an unsuitable recipe raises its error before anything starts.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_fuse.errors import UserError
from megatron_fuse.model.config_file import MOST_LAYERS, ModelConfig, check_config, load_config, reason
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.strict_json import read_object
from megatron_fuse.text_safety import brief

# By model_type.
SUPPORTED = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
# The frequencies of these types do not depend on the sequence length,
# and the types do not scale cosine and sine.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Sizes are counts of elements.
    """

    family: str  # the Hugging Face class, e.g. "LlamaForCausalLM"
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # the config's, which may differ from len(tokenizer)
    max_position_embeddings: int
    rms_norm_eps: float
    qkv_bias: bool
    tied_embeddings: bool  # the output layer has the embedding's weights
    # In layers with a window a token sees itself and the sliding_window - 1 tokens before it.
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]  # [num_layers]: whether the layer has a window
    inverse_frequencies: tuple[float, ...]  # [head_dim / 2], rotation per position in radians, exact in fp32
    initializer_range: float
    origin: str = field(default="the model's config", compare=False)  # the config's file, for messages

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size, rounded up.

        It is the same at every layout, so that a checkpoint loads at all layouts.
        """
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


# The upper bounds are far above any published model. A larger value is a mistake, and would fill the memory
# before it is noticed.
Width = Annotated[int, Field(ge=1, le=2**24)]
Heads = Annotated[int, Field(ge=1, le=2**16)]
Positions = Annotated[int, Field(ge=1, le=2**31 - 1)]


class TargetConfig(ModelConfig):
    """config.json of a target.

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


def read_architecture(source: str | os.PathLike | PreTrainedConfig) -> Architecture:
    """The architecture of a Hugging Face model directory or config.

    Only config.json is read: a directory without weights is enough. Raises UserError, which names the file
    and the key, for a missing or malformed file, an unsupported class, and every option of a supported class
    that FusionGPTModel does not have.
    """
    if isinstance(source, PreTrainedConfig):
        origin, family, content = (
            "the model's config",
            _family(source, "the model's config"),
            source.to_dict(),
        )
    else:
        path = Path(source) / "config.json"
        origin, family, content = str(path), None, _read_supported(path)
    stated = check_config(TargetConfig, content, origin)
    config = source if isinstance(source, PreTrainedConfig) else load_config(Path(source))
    family = family or _family(config, origin)

    def refuse(key: str, value: object, allowed: str) -> None:
        raise UserError(f"{origin}: {key} is {quoted(value)}, but a target of class {family} needs {allowed}")

    if config.hidden_act != "silu":
        refuse("hidden_act", config.hidden_act, "'silu'")
    for key in ("attention_bias", "mlp_bias"):  # Llama's attention_bias also gives o_proj a bias
        if getattr(config, key, False):
            refuse(key, True, "false (biases are supported on Qwen2's query, key and value only)")
    heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if heads % groups:
        refuse("num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
    if stated.head_dim is None and config.hidden_size % (2 * heads):
        refuse("hidden_size", config.hidden_size, f"an even multiple of num_attention_heads ({heads})")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)  # Qwen2's is None unless use_sliding_window
    kinds = {*(stated.layer_types or ())}
    if kinds - {
        "full_attention",
        *(["sliding_attention"] if window and family == "Qwen2ForCausalLM" else []),
    }:
        refuse(
            "layer_types",
            sorted(kinds),
            "only full_attention, or also sliding_attention for a Qwen2 model with a window",
        )
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=family == "Qwen2ForCausalLM",
        tied_embeddings=config.tie_word_embeddings,
        sliding_window=window,
        sliding_layers=_sliding_layers(config, family, window),
        inverse_frequencies=_inverse_frequencies(config, head_dim, origin),
        initializer_range=config.initializer_range,
        origin=origin,
    )


def check_layout(
    architecture: Architecture,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    seq_length: int | None = None,
) -> None:
    """Raises UserError, which names the option, both values and the fix,
    if the architecture does not fit this layout.

    virtual_pipeline_model_parallel_size: model chunks per pipeline rank; None or 1: one chunk.
    seq_length: tokens.
    """
    tensor, pipeline = tensor_model_parallel_size, pipeline_model_parallel_size
    virtual = virtual_pipeline_model_parallel_size or 1
    where = architecture.origin
    for option, value in (("tensor", tensor), ("pipeline", pipeline), ("virtual-pipeline", virtual)):
        if value < 1:
            raise UserError(f"--{option}-model-parallel-size is {value}, but must be at least 1")
    divided = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "intermediate_size": architecture.ffn_hidden_size,
        "the padded vocabulary": architecture.padded_vocab_size,
    }
    allowed = [
        size
        for size in range(1, architecture.num_query_groups + 1)
        if not any(n % size for n in divided.values())
    ]
    for name, count in divided.items():
        if count % tensor:
            raise UserError(
                f"--tensor-model-parallel-size {tensor} does not divide {name} ({count}) of {where}. Choose "
                f"one of {', '.join(map(str, allowed))}."
            )
    if virtual > 1 and pipeline == 1:
        raise UserError(
            f"--virtual-pipeline-model-parallel-size {virtual} needs --pipeline-model-parallel-size of at "
            "least 2, not 1"
        )
    if architecture.num_layers % (pipeline * virtual):
        chunks = f"--pipeline-model-parallel-size {pipeline}"
        if virtual > 1:
            chunks += f" x --virtual-pipeline-model-parallel-size {virtual}"
        raise UserError(
            f"{chunks} does not divide num_hidden_layers ({architecture.num_layers}) of {where}. Choose "
            f"sizes whose product divides {architecture.num_layers}."
        )
    if seq_length is not None and seq_length > architecture.max_position_embeddings:
        raise UserError(
            f"--seq-length {seq_length} is longer than max_position_embeddings "
            f"({architecture.max_position_embeddings}) of {where}. Choose a shorter length."
        )


def _read_supported(path: Path) -> dict[str, Any]:
    """The content of config.json.

    Its class is checked first, because transformers does not know every class.
    """
    content = read_object(path)
    classes = check_config(ModelConfig, content, str(path)).architectures
    if not classes:
        raise UserError(f"{path} has no key 'architectures'. Add the class: one of {', '.join(SUPPORTED)}.")
    if not set(classes) & set(SUPPORTED):
        raise UserError(_unsupported(path, brief(", ".join(classes), 100)))
    return content


def _family(config: PreTrainedConfig, origin: str) -> str:
    """The class of a config, by its model_type if it names none.

    Raises UserError for an unsupported class.
    """
    family_of = {model_type: family for family, model_type in SUPPORTED.items()}
    family = (config.architectures or [family_of.get(config.model_type, config.model_type)])[0]
    if SUPPORTED.get(family) != config.model_type:
        raise UserError(_unsupported(origin, f"{family} (model_type {config.model_type})"))
    return family


def _unsupported(origin: object, class_name: str) -> str:
    return (
        f"{origin}: architectures: a target of class {class_name} is not supported. Choose a model of class "
        f"{', '.join(SUPPORTED)}."
    )


def _sliding_layers(config: PreTrainedConfig, family: str, window: int | None) -> tuple[bool, ...]:
    """[num_layers]: whether each layer has the window.

    All layers of Mistral have it.
    Of Qwen2 those that layer_types names have it, by default the layers from max_window_layers on.
    """
    if window is None:
        return (False,) * config.num_hidden_layers
    if family == "Qwen2ForCausalLM":
        return tuple(kind == "sliding_attention" for kind in config.layer_types)
    return (True,) * config.num_hidden_layers


def _inverse_frequencies(config: PreTrainedConfig, head_dim: int, origin: str) -> tuple[float, ...]:
    """The frequencies as transformers computes them. Megatron's Llama-3 scaling uses only the factor, and
    would silently differ."""
    rope = config.rope_parameters or {}
    rope_type, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        allowed = ", ".join(SUPPORTED_ROPE_TYPES)
        raise UserError(
            f"{origin}: rope type {quoted(rope_type)} is not supported. Choose a model with a rope_type of "
            f"{allowed}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{origin}: partial_rotary_factor is {quoted(rope['partial_rotary_factor'])}, but only 1.0 is "
            "supported"
        )
    for key, value in rope.items():
        if isinstance(value, list):
            raise UserError(f"{origin}: {key} is {quoted(value)}, but must be one number for all layers")
    if theta is None:
        raise UserError(
            f"{origin}: rope_theta is missing. Add the base of the rotary frequencies, such as 10000.0."
        )
    if rope_type == "default":
        if rope.get("factor") not in (None, 1):
            raise UserError(
                f"{origin}: factor is {rope['factor']}, but rope_type is 'default', which has no factor. "
                "Set rope_type."
            )
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        frequencies = 1.0 / (theta**exponents)
    else:
        try:
            frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](config)
        except Exception as error:  # a key is missing or null
            raise UserError(
                f"{origin}: the frequencies cannot be computed from rope_scaling: {reason(error)}"
            ) from error
    if not (frequencies.isfinite() & (frequencies > 0)).all():
        raise UserError(
            f"{origin}: rope_theta ({theta}) and its scaling give frequencies that are not above 0"
        )
    return tuple(frequencies.tolist())
