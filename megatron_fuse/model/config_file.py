"""Checks config.json and generation_config.json of any Hugging Face model directory,
before a library uses them.

transformers accepts most values of most keys. With a wrong one it fails, fills the memory or computes
nonsense later. This file checks the keys by which the model families name their sizes and constants. All
other keys are left to transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator, model_validator
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from megatron_fuse.errors import UserError
from megatron_fuse.model.weight_files import refuse_adapter
from megatron_fuse.own_code import not_loadable
from megatron_fuse.storage.records import parse_record, quoted
from megatron_fuse.storage.strict_json import read_object
from megatron_fuse.text_safety import brief

Config = TypeVar("Config", bound="ModelConfig")

MOST_LAYERS = 10_000
_CORRECT = "Correct the value, or fetch the model again."
_INT32 = 2**31 - 1


def _each(is_right: Callable[[Any], bool], expected: str) -> AfterValidator:
    """A check of a value, or of every value of a list:
    some families have one per layer. null means the family's default."""

    def check(value: Any) -> Any:
        parts = value if isinstance(value, list) and value else [value]
        if value is not None and not all(map(is_right, parts)):
            raise ValueError(f"must be {expected}")
        return value

    return AfterValidator(check)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
    )


def _integers(least: int, most: int) -> AfterValidator:
    return _each(
        lambda value: type(value) is int and least <= value <= most, f"an integer from {least} to {most}"
    )


def _numbers(least: float, most: float) -> AfterValidator:
    return _each(
        lambda value: type(value) in (int, float) and least <= value <= most,
        f"a number from {least:g} to {most:g}",
    )


Sizes = Annotated[Any, _integers(1, _INT32)]
Layers = Annotated[Any, _integers(1, MOST_LAYERS)]
TokenIds = Annotated[Any, _integers(-1, _INT32)]  # -1: none, in the configs of the first Llama
# Below the bound an epsilon vanishes in fp32. Above 1 it outweighs the value that it is added to.
Epsilons = Annotated[Any, _numbers(1e-30, 1)]
Thetas = Annotated[Any, _numbers(1, 1e15)]
Factors = Annotated[Any, _numbers(1e-6, 1e6)]


Dtype = Annotated[Any, _each(_is_dtype, "the name of a torch type, such as bfloat16")]


class _Strict(BaseModel):
    """Values are not converted to another type. Further keys are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class RopeParameters(_Strict):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Thetas = None
    factor: Factors = None
    low_freq_factor: Factors = None
    high_freq_factor: Factors = None
    attention_factor: Factors = None
    original_max_position_embeddings: Sizes = None
    partial_rotary_factor: Annotated[Any, _numbers(1e-6, 1)] = None

    @field_validator("*", mode="before")
    @classmethod
    def _check_is_one(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("must be one value, not a list")
        return value

    @model_validator(mode="after")
    def _check_bands(self) -> Self:
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor ({low}) must be below high_freq_factor ({high})")
        return self


class ModelConfig(_Strict):
    """The keys of any config.json that are checked. All are optional."""

    architectures: list[str] | None = None
    model_type: str | None = None
    vocab_size: Sizes = None
    hidden_size: Sizes = None
    d_model: Sizes = None
    n_embd: Sizes = None
    embedding_size: Sizes = None
    intermediate_size: Sizes = None
    ffn_hidden_size: Sizes = None
    d_ff: Sizes = None
    n_inner: Sizes = None
    num_hidden_layers: Layers = None
    num_layers: Layers = None
    n_layers: Layers = None
    n_layer: Layers = None
    num_attention_heads: Sizes = None
    num_heads: Sizes = None
    n_heads: Sizes = None
    n_head: Sizes = None
    num_key_value_heads: Sizes = None
    head_dim: Sizes = None
    max_position_embeddings: Sizes = None
    n_positions: Sizes = None
    n_ctx: Sizes = None
    max_seq_len: Sizes = None
    seq_length: Sizes = None
    sliding_window: Sizes = None
    num_labels: Sizes = None
    rms_norm_eps: Epsilons = None
    layer_norm_eps: Epsilons = None
    layer_norm_epsilon: Epsilons = None
    norm_epsilon: Epsilons = None
    norm_eps: Epsilons = None
    rope_theta: Thetas = None
    rotary_emb_base: Thetas = None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    dtype: Dtype = None
    torch_dtype: Dtype = None
    auto_map: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    # With this key transformers would read another file instead of this one.
    configuration_files: None = None

    @property
    def layers(self) -> int | None:
        """The number of layers, by any of the known names; None if the config has none of them."""
        named = (self.num_hidden_layers, self.num_layers, self.n_layers, self.n_layer)
        return next((count for count in named if isinstance(count, int)), None)


class GenerationConfig(_Strict):
    """The checked keys of generation_config.json. transformers would notice a wrong value only during
    generation, or never."""

    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    max_length: Sizes = None
    max_new_tokens: Sizes = None
    do_sample: bool | None = None
    temperature: Annotated[Any, _numbers(0, 1e4)] = None
    top_k: Annotated[Any, _integers(-1, _INT32)] = None
    top_p: Annotated[Any, _numbers(0, 1)] = None
    repetition_penalty: Annotated[Any, _numbers(1e-4, 1e4)] = None


def read_model_config(model_dir: Path) -> ModelConfig:
    """The config.json of a model directory.

    For a model that also reads images it is the part of the text model.

    Raises UserError, which names the file and the key, for a missing or malformed file and for impossible
    sizes and constants.
    """
    path = model_dir / "config.json"
    config = check_config(ModelConfig, read_object(path), str(path))
    if not config.text_config:
        return config
    text = check_config(ModelConfig, config.text_config, f"{path}: text_config")
    return text.model_copy(
        update={"architectures": config.architectures, "quantization_config": config.quantization_config}
    )


def check_config(model: type[Config], content: dict[str, Any], place: str) -> Config:
    """The content of a config.json as an object of class `model`. place: the file, for errors. Raises
    UserError for a wrong key."""
    config = parse_record(content, model, place, _CORRECT)
    # One mapping for all layers, or one for each kind of layer.
    for key in ("rope_scaling", "rope_parameters"):
        rope = getattr(config, key)
        for kind, part in (rope.model_extra or {}).items() if rope else ():
            if isinstance(part, dict):
                parse_record(part, RopeParameters, f"{place}: {key}.{kind}", _CORRECT)
    return config


def check_model_directory(model_dir: Path) -> ModelConfig:
    """read_model_config, and checks of the other files that transformers reads by itself when it loads a
    model.

    Raises UserError for a malformed generation_config.json, and for an adapter: transformers applies an
    adapter only if `peft` is installed, so that the model would depend on the machine.
    """
    config = read_model_config(model_dir)
    refuse_adapter(model_dir)
    _generation_config(model_dir)
    return config


def _generation_config(model_dir: Path) -> GenerationConfig:
    """generation_config.json; without any value if the file does not exist.

    Raises UserError for a malformed file.
    """
    path = model_dir / "generation_config.json"
    if not (path.exists() or path.is_symlink()):
        return GenerationConfig()
    return parse_record(read_object(path), GenerationConfig, str(path), _CORRECT)


def end_token_ids(model_dir: Path) -> list[int]:
    """The ids at which generation_config.json ends an answer; empty if it lists none.

    Raises UserError for a malformed file.
    """
    return _ids(_generation_config(model_dir).eos_token_id)


def ends_of_answers(model_dir: Path) -> list[int]:
    """The ids at which servers of a model directory end an answer: those of generation_config.json, else
    those of config.json."""
    return end_token_ids(model_dir) or _ids(read_model_config(model_dir).eos_token_id)


def _ids(value: Any) -> list[int]:
    """The ids in a value that is one id, a list of ids, or none:
    null, or -1 in the configs of the first Llama."""
    return [
        token for token in (value if isinstance(value, list) else [value]) if token is not None and token >= 0
    ]


def load_config(
    model_dir: Path, *, trust_remote_code: bool = False, allowed_by: str | None = None
) -> PreTrainedConfig:
    """transformers' config of a model directory, after read_model_config. allowed_by: see not_loadable.

    Raises UserError, which names the file and the key, if transformers refuses the config. Code of the model
    runs only with trust_remote_code; without it transformers does not ask the user for permission either.
    """
    read_model_config(model_dir)
    path = model_dir / "config.json"
    try:
        config = AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers reports a bad value in many classes
        raise not_loadable(path, error, _key_at_fault(read_object(path)), allowed_by) from error
    if not trust_remote_code and isinstance(rope := getattr(config, "rope_parameters", None), dict):
        for part in (rope, *rope.values()):
            if not isinstance(part, dict) or "rope_type" not in part:
                continue
            if not hasattr(config, f"_validate_{(kind := part['rope_type'])}_rope_parameters"):
                raise UserError(f"{path}: rope_type is {quoted(kind)}, which transformers does not know")
    return config


def reason(error: BaseException, config: PreTrainedConfig | None = None) -> str:
    """The message of a library's error, short enough for a UserError.

    config: the config that the library used. A KeyError names only a value, such as an unknown activation;
    the config's keys with that value are then put before the message.
    """
    message = brief(f"{type(error).__name__}: {error}")
    if config is not None and isinstance(error, KeyError):
        keys = [key for key, value in config.to_dict().items() if value == error.args[0]]
        return brief(f"{', '.join(keys)}: {message}") if keys else message
    return message


def _key_at_fault(content: dict[str, Any]) -> str:
    """The key without which transformers accepts the config, or an empty text if there is no such key."""
    if content.get("model_type") not in CONFIG_MAPPING:
        return "model_type"
    config_class = CONFIG_MAPPING[content["model_type"]]
    for left_out in content:
        try:
            config_class.from_dict({key: value for key, value in content.items() if key != left_out})
        except Exception:  # as in load_config
            continue
        return brief(left_out, 60)
    return ""
