"""The architecture of the target: one frozen description, read from a Hugging Face config, and the checks of
a parallel layout.

Nothing here builds a model or needs Megatron,
so that an unsuitable recipe raises its error before anything starts.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from megatron_fuse.errors import UserError
from megatron_fuse.model.config_file import ModelConfig, check_config, load_config
from megatron_fuse.model.families import FAMILIES, Family
from megatron_fuse.model.families.family import TargetConfig
from megatron_fuse.model.families.mixture import Experts
from megatron_fuse.model.pipeline_split import EVEN, PipelineSplit, layers_of_stages
from megatron_fuse.model.rope import read_rotation
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.strict_json import read_object
from megatron_fuse.text_safety import brief

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Architecture:
    """A decoder: RMSNorm, rotary positions, grouped-query attention, a gated MLP or a mixture of them.

    Sizes are counts of elements. Fields with a default are what a Llama does not have.
    """

    family: str  # the Hugging Face class, e.g. "LlamaForCausalLM"
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of the MLP, or of one expert
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # the config's, which may differ from len(tokenizer)
    max_position_embeddings: int
    rms_norm_eps: float
    tied_embeddings: bool  # the output layer has the embedding's weights
    # In layers with a window a token sees itself and the sliding_window - 1 tokens before it.
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]  # [num_layers]: whether the layer has a window
    inverse_frequencies: tuple[float, ...]  # [rotated channels / 2], radians per position, exact in fp32
    initializer_range: float
    qkv_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the gate
    # The norms of a layer: before attention and MLP, and after both, before the residual sum.
    norms_before: bool = True
    norms_after: bool = False
    zero_centered_norms: bool = False  # norms scale by 1 + weight
    query_key_norm: Literal["none", "per head", "all heads"] = "none"
    rotated_layers: tuple[bool, ...] | None = None  # whether the layer rotates; None: all do
    rotation_scale: float = 1.0  # of the rotated channels: of yarn and longrope
    longest_rotation: int | None = None  # tokens; inverse_frequencies are not those of longer sequences
    local_inverse_frequencies: tuple[float, ...] | None = None  # of layers with a window, if they have others
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores x become softcap tanh(x / softcap)
    logit_softcap: float | None = None  # so do logits
    embedding_scale: float | None = None  # of the embedding's output, in the weights' dtype
    experts: Experts | None = None  # in the place of each MLP
    origin: str = field(default="the model's config", compare=False)  # the config's file, for messages

    @property
    def ffn_width(self) -> int:
        """The width of the MLP that a token goes through: of a mixture, that of all its experts together."""
        return self.ffn_hidden_size * (1 if self.experts is None else self.experts.per_token)

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size, rounded up.

        It is the same at every layout, so that a checkpoint loads at all layouts.
        """
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def read_architecture(source: str | os.PathLike | PreTrainedConfig) -> Architecture:
    """The architecture of a Hugging Face model directory or config.

    Only config.json is read: a directory without weights is enough. Raises UserError, which names the file
    and the key, for a missing or malformed file, an unsupported class, and every option of a supported class
    that FusionGPTModel does not have.
    """
    if isinstance(source, PreTrainedConfig):
        origin = "the model's config"
        config, family = source, _family(source, origin)
        stated = check_config(family.config, source.to_dict(), origin)
    else:
        path = Path(source) / "config.json"
        origin, (content, family) = str(path), _read_supported(path)
        stated = check_config(family.config, content, origin)
        config = load_config(Path(source))
        family = _family(config, origin)
    _check_needs(config, family, origin)
    head_dim = _head_dim(config, stated, family, origin)
    window, sliding_layers = _windows(config, stated, family, origin)
    kinds = ("full_attention", "sliding_attention") if family.rope_by_layer_type else (None,)
    rotation, *others = (
        read_rotation(config, head_dim, origin, partial=family.partial_rotary, layer_type=kind)
        for kind in kinds
    )
    for other in others:
        if other.scale != rotation.scale or other.longest != rotation.longest:
            raise UserError(
                f"{origin}: rope_parameters: layers with and without a window have rotations of different "
                "scales or lengths (yarn, longrope), which is not supported. Choose a model with one scale."
            )
    base = Architecture(
        family=family.name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings,
        sliding_window=window,
        sliding_layers=sliding_layers,
        inverse_frequencies=rotation.inverse_frequencies,
        local_inverse_frequencies=others[0].inverse_frequencies if others else None,
        rotation_scale=rotation.scale,
        longest_rotation=rotation.longest,
        initializer_range=config.initializer_range,
        origin=origin,
    )
    architecture = replace(base, **family.traits(config))
    experts = architecture.experts
    if experts is not None and experts.per_token == 1 and experts.normalized:
        _refuse(origin, family, "num_experts_per_tok", 1, "at least 2: one expert alone has the weight 1")
    return architecture


def shares_sequence(architecture: Architecture, tensor_model_parallel_size: int, asked: bool) -> bool:
    """Whether the tensor ranks share the sequence between the matrices: as asked, and in a mixture always.

    Otherwise each of them would give every token to its experts.
    """
    return asked or (architecture.experts is not None and tensor_model_parallel_size > 1)


def check_layout(
    architecture: Architecture,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    split: PipelineSplit = EVEN,
    seq_length: int | None = None,
) -> None:
    """Raises UserError, which names the option, both values and the fix,
    if the architecture does not fit this layout.

    virtual_pipeline_model_parallel_size: model chunks per pipeline rank; None or 1: one chunk.
    expert_tensor_parallel_size: ranks of each expert; None: tensor_model_parallel_size.
    split: what is stated of the layers of the stages.
    seq_length: tokens.
    """
    tensor, pipeline = tensor_model_parallel_size, pipeline_model_parallel_size
    virtual = virtual_pipeline_model_parallel_size or 1
    where = architecture.origin
    for option, value in (("tensor", tensor), ("pipeline", pipeline), ("virtual-pipeline", virtual)):
        if value < 1:
            raise UserError(f"--{option}-model-parallel-size is {value}, but must be at least 1")
    _check_tensor_parallel(architecture, tensor)
    _check_experts(architecture, expert_model_parallel_size, expert_tensor_parallel_size, tensor)
    if virtual > 1 and pipeline == 1:
        raise UserError(
            f"--virtual-pipeline-model-parallel-size {virtual} needs --pipeline-model-parallel-size of at "
            "least 2, not 1"
        )
    if virtual > 1 and architecture.num_layers % (pipeline * virtual):
        raise UserError(
            f"--pipeline-model-parallel-size {pipeline} x --virtual-pipeline-model-parallel-size {virtual} "
            f"does not divide num_hidden_layers ({architecture.num_layers}) of {where}. Choose sizes whose "
            f"product divides {architecture.num_layers}."
        )
    layers_of_stages(architecture.num_layers, pipeline, split)
    if seq_length is not None:
        _check_length(architecture, seq_length)


def _check_tensor_parallel(architecture: Architecture, tensor: int) -> None:
    divided = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "the padded vocabulary": architecture.padded_vocab_size,
    }
    if architecture.experts is None:
        divided["intermediate_size"] = architecture.ffn_hidden_size
    allowed = [
        size
        for size in range(1, architecture.num_query_groups + 1)
        if not any(n % size for n in divided.values())
    ]
    for name, count in divided.items():
        if count % tensor:
            raise UserError(
                f"--tensor-model-parallel-size {tensor} does not divide {name} ({count}) of "
                f"{architecture.origin}. Choose one of {', '.join(map(str, allowed))}."
            )


def _check_experts(
    architecture: Architecture, expert_parallel: int, expert_tensor: int | None, tensor: int
) -> None:
    where, experts = architecture.origin, architecture.experts
    if experts is None:
        if expert_parallel > 1 or expert_tensor not in (None, 1, tensor):
            option = "model" if expert_parallel > 1 else "tensor"
            raise UserError(
                f"--expert-{option}-parallel-size needs a mixture of experts, but the model of {where} has "
                "no experts. Remove the option."
            )
        return
    if experts.count % expert_parallel:
        raise UserError(
            f"--expert-model-parallel-size {expert_parallel} does not divide the {experts.count} experts of "
            f"{where}. Choose one of {', '.join(map(str, _divisors(experts.count)))}."
        )
    width = architecture.ffn_hidden_size
    if width % (expert_tensor or tensor):
        option = "tensor-model" if expert_tensor in (None, tensor) else "expert-tensor"
        raise UserError(
            f"--{option}-parallel-size {expert_tensor or tensor} does not divide the width of an expert "
            f"({width}) of {where}. Choose a divisor, or share whole experts: a larger "
            "--expert-model-parallel-size and a smaller --expert-tensor-parallel-size."
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _check_length(architecture: Architecture, seq_length: int) -> None:
    where, most = architecture.origin, architecture.max_position_embeddings
    if seq_length > most:
        raise UserError(
            f"--seq-length {seq_length} is longer than max_position_embeddings ({most}) of {where}. Choose a "
            "shorter length."
        )
    longest = architecture.longest_rotation
    if longest is not None and seq_length > longest:
        raise UserError(
            f"--seq-length {seq_length} is longer than original_max_position_embeddings ({longest}) of "
            f"{where}. longrope has other frequencies for longer texts, and a run cannot have both. Choose a "
            f"length of at most {longest}."
        )


def _read_supported(path: Path) -> tuple[dict[str, Any], Family]:
    """The content of config.json, and its family.

    Its class is checked first, because transformers does not know every class.
    """
    content = read_object(path)
    classes = check_config(ModelConfig, content, str(path)).architectures
    if not classes:
        raise UserError(f"{path} has no key 'architectures'. Add the class: one of {', '.join(FAMILIES)}.")
    supported = [FAMILIES[name] for name in classes if name in FAMILIES]
    if not supported:
        raise UserError(_unsupported(path, brief(", ".join(classes), 100)))
    return content, supported[0]


def _family(config: PreTrainedConfig, origin: str) -> Family:
    """The family of a config, by its model_type if it names no class.

    Raises UserError for an unsupported class.
    """
    name_of = {family.model_type: name for name, family in FAMILIES.items()}
    name = (config.architectures or [name_of.get(config.model_type, config.model_type)])[0]
    family = FAMILIES.get(name)
    if family is None or family.model_type != config.model_type:
        raise UserError(_unsupported(origin, f"{name} (model_type {config.model_type})"))
    return family


def _unsupported(origin: object, class_name: str) -> str:
    return (
        f"{origin}: architectures: a target of class {class_name} is not supported. Choose a model of class "
        f"{', '.join(FAMILIES)}."
    )


def _refuse(origin: str, family: Family, key: str, value: object, allowed: str) -> None:
    raise UserError(
        f"{origin}: {key} is {quoted(value)}, but a target of class {family.name} needs {allowed}"
    )


def _check_needs(config: PreTrainedConfig, family: Family, origin: str) -> None:
    """Raises UserError for an option of the class that is not reproduced."""
    for key, need in family.needs.items():
        if (value := getattr(config, key, None)) not in need.values:
            _refuse(origin, family, key, value, need.words)


def _head_dim(config: PreTrainedConfig, stated: TargetConfig, family: Family, origin: str) -> int:
    """Channels of a head. Raises UserError if the heads do not fit one another or the hidden size."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if heads % groups:
        _refuse(origin, family, "num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
    if stated.head_dim is None and config.hidden_size % (2 * heads):
        allowed = f"an even multiple of num_attention_heads ({heads})"
        _refuse(origin, family, "hidden_size", config.hidden_size, allowed)
    return getattr(config, "head_dim", None) or config.hidden_size // heads


def _windows(
    config: PreTrainedConfig, stated: TargetConfig, family: Family, origin: str
) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and by layer whether it has the window.

    Raises UserError for kinds of layers that the family does not have.
    """
    window = None if family.windows == "none" else getattr(config, "sliding_window", None)
    by_type = window is not None and family.windows == "by layer_types"
    kinds = {*(stated.layer_types or ())}
    if kinds - {"full_attention", *(["sliding_attention"] if by_type else [])}:
        allowed = "only full_attention, or also sliding_attention for a class with windows by layer"
        _refuse(origin, family, "layer_types", sorted(kinds), allowed)
    if by_type:
        sliding = tuple(kind == "sliding_attention" for kind in config.layer_types)
    else:
        sliding = (window is not None,) * config.num_hidden_layers
    return window, sliding
