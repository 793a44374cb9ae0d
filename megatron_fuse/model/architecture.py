"""What the target model is: one frozen description read from a Hugging Face config, and what a parallel layout asks of it.

Nothing here builds a model or needs Megatron, so that a recipe is refused before anything is started.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_fuse.errors import UserError

SUPPORTED = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}  # by model_type
# The frequencies of these do not change with the sequence length and scale neither cosine nor sine.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Sizes are counts of elements."""

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
    tied_embeddings: bool  # output weights are the embedding's
    sliding_window: int | None  # a token sees itself and the sliding_window - 1 before it, in layers that have a window
    sliding_layers: tuple[bool, ...]  # [num_layers], whether it has one
    inverse_frequencies: tuple[float, ...]  # [head_dim / 2], rotation per position in radians, exact in fp32
    initializer_range: float
    origin: str = field(default="the model's config", compare=False)  # the file it was read from, for messages

    @property
    def padded_vocab_size(self) -> int:
        """The same at every layout, so that a checkpoint fits all of them."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def read_architecture(source: str | os.PathLike | PreTrainedConfig) -> Architecture:
    """The architecture of a Hugging Face model directory or config.

    Only config.json is read: a directory without weights will do. Raises UserError, naming the file and the key, for a missing
    or malformed file, an unsupported class, and every option of a supported class that this model would not reproduce.
    """
    config = source if isinstance(source, PreTrainedConfig) else _read_config(Path(source))
    origin = "the model's config" if isinstance(source, PreTrainedConfig) else str(Path(source) / "config.json")
    family = _family(config, origin)

    def refuse(key: str, value: object, allowed: str) -> None:
        raise UserError(f"{origin}: {key} is {value!r}, but a target of class {family} needs {allowed}")

    if config.hidden_act != "silu":
        refuse("hidden_act", config.hidden_act, "'silu'")
    for key in ("attention_bias", "mlp_bias"):  # Llama's attention_bias also puts one on o_proj
        if getattr(config, key, False):
            refuse(key, True, "false (biases are supported on Qwen2's query, key and value only)")
    heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if heads % groups:
        refuse("num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)  # Qwen2's is None unless use_sliding_window
    if window is not None and window < 1:
        refuse("sliding_window", window, "null or at least 1")
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
        tied_embeddings=bool(config.tie_word_embeddings),
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
    """Raises UserError, naming the option, both values and the mend, if the architecture cannot be laid out like this.

    virtual_pipeline_model_parallel_size: model chunks per pipeline rank, None or 1 for one. seq_length: tokens.
    """
    tensor, pipeline = tensor_model_parallel_size, pipeline_model_parallel_size
    virtual = virtual_pipeline_model_parallel_size or 1
    where = architecture.origin
    for option, value in (("tensor", tensor), ("pipeline", pipeline), ("virtual-pipeline", virtual)):
        if value < 1:
            raise UserError(f"--{option}-model-parallel-size is {value}: it must be at least 1")
    divided = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "intermediate_size": architecture.ffn_hidden_size,
        "the padded vocabulary": architecture.padded_vocab_size,
    }
    allowed = [
        size for size in range(1, architecture.num_query_groups + 1) if not any(n % size for n in divided.values())
    ]
    for name, count in divided.items():
        if count % tensor:
            raise UserError(
                f"--tensor-model-parallel-size {tensor} does not divide {name} ({count}) of {where}: "
                f"choose one of {', '.join(map(str, allowed))}"
            )
    if virtual > 1 and pipeline == 1:
        raise UserError(
            f"--virtual-pipeline-model-parallel-size {virtual} needs --pipeline-model-parallel-size of at least 2, not 1"
        )
    if architecture.num_layers % (pipeline * virtual):
        chunks = f"--pipeline-model-parallel-size {pipeline}"
        if virtual > 1:
            chunks += f" x --virtual-pipeline-model-parallel-size {virtual}"
        raise UserError(
            f"{chunks} does not divide num_hidden_layers ({architecture.num_layers}) of {where}: "
            f"choose sizes whose product divides {architecture.num_layers}"
        )
    if seq_length is not None and seq_length > architecture.max_position_embeddings:
        raise UserError(
            f"--seq-length {seq_length} is longer than max_position_embeddings ({architecture.max_position_embeddings}) "
            f"of {where}: choose a shorter one"
        )


def _read_config(model_dir: Path) -> PreTrainedConfig:
    path = model_dir / "config.json"
    try:
        architectures = json.loads(path.read_text(encoding="utf-8"))["architectures"]
        if not set(architectures) & set(SUPPORTED):  # before AutoConfig, which does not know every class
            raise UserError(_unsupported(path, ", ".join(architectures)))
        return AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a Hugging Face model directory") from None
    except KeyError:
        raise UserError(f"{path} has no key 'architectures': add the class, one of {', '.join(SUPPORTED)}") from None
    except Exception as error:  # transformers reports a bad value in several classes of its own
        raise UserError(f"{path} is not a usable model config: {error}") from error


def _family(config: PreTrainedConfig, origin: str) -> str:
    of_type = {model_type: family for family, model_type in SUPPORTED.items()}
    family = (config.architectures or [of_type.get(config.model_type, config.model_type)])[0]
    if SUPPORTED.get(family) != config.model_type:
        raise UserError(_unsupported(origin, f"{family} (model_type {config.model_type})"))
    return family


def _unsupported(origin: object, found: str) -> str:
    return f"{origin}: a target of class {found} is not supported: choose a model of class {', '.join(SUPPORTED)}"


def _sliding_layers(config: PreTrainedConfig, family: str, window: int | None) -> tuple[bool, ...]:
    """All of Mistral's layers have its window; of Qwen2's those that layer_types names, by default from max_window_layers on."""
    if window is None:
        return (False,) * config.num_hidden_layers
    if family == "Qwen2ForCausalLM":
        return tuple(kind == "sliding_attention" for kind in config.layer_types)
    return (True,) * config.num_hidden_layers


def _inverse_frequencies(config: PreTrainedConfig, head_dim: int, origin: str) -> tuple[float, ...]:
    """transformers' own frequencies; Megatron's Llama-3 scaling knows only the factor, and would differ without a word."""
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        allowed = ", ".join(SUPPORTED_ROPE_TYPES)
        raise UserError(f"{origin}: rope type {rope_type!r} is not supported: choose a model with one of {allowed}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{origin}: partial_rotary_factor is {rope['partial_rotary_factor']}, but only 1.0 is supported"
        )
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return tuple((1.0 / (rope["rope_theta"] ** exponents)).tolist())
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](config)
    return tuple(frequencies.tolist())
