"""Sizes from config.json alone are the published ones, and those of the weights of real files."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import FAMILIES, save_model

from megatron_fuse.errors import UserError
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.planning.sizes import ModelSize, read_size

MODELS = Path(__file__).resolve().parents[2] / "examples" / "scaling" / "models"

# The numbers of parameters that the models' pages on the hub state.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-72b": 72_706_203_648,
    "gemma-2-27b": 27_227_128_320,
    "mistral-7b": 7_241_732_096,
    "mpt-7b": 6_649_286_656,
    "qwen3-235b-a22b-fp8": 235_093_634_560,
}

# Configs whose other keys are transformers' defaults, which are those of the published models.
MIXTURES: dict[str, tuple[dict[str, Any], float, float]] = {
    # Mixtral-8x7B: 46.7B, of which a token uses 12.9B
    "mixtral": ({"model_type": "mixtral", "num_key_value_heads": 8}, 46.7e9, 12.9e9),
    # DeepSeek-V3: 671B, 37B
    "deepseek_v3": ({"model_type": "deepseek_v3"}, 671e9, 37e9),
    # gpt-oss-120b: 116.8B, 5.1B
    "gpt_oss": ({"model_type": "gpt_oss"}, 116.8e9, 5.1e9),
}


def written(directory: Path, content: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_gives_the_published_number_of_parameters(name: str) -> None:
    assert read_size(MODELS / name, "sources.a").parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_uses_a_part_of_a_mixture(tmp_path: Path, name: str) -> None:
    content, parameters, used = MIXTURES[name]
    size = read_size(written(tmp_path, content), "sources.a")
    assert size.is_mixture
    assert size.parameters == pytest.approx(parameters, rel=0.002)
    # The published number counts the embedding as well.
    assert size.multiplied + size.head + size.embedding == pytest.approx(used, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_a_model_are_as_many_as_its_config_says(tmp_path: Path, family: str) -> None:
    directory = save_model(tmp_path / family, family)
    assert read_size(directory, "sources.a").parameters == count_parameters(directory)


def test_quantised_layers_take_fewer_bytes() -> None:
    size = read_size(MODELS / "qwen3-235b-a22b-fp8", "sources.a")
    ends = 2 * size.embedding  # embedding and output layer are not tied, and not quantised
    assert size.weight_bytes("bf16") == size.parameters - ends + 2 * ends


@pytest.mark.parametrize(
    ("stated", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "mxfp4"}, 4),
        ({"quant_method": "unknown"}, None),
        (None, None),
    ],
)
def test_the_bits_of_a_weight_are_read(tmp_path: Path, stated: dict | None, bits: int | None) -> None:
    content = json.loads((MODELS / "llama-2-7b" / "config.json").read_text())
    if stated:
        content["quantization_config"] = stated
    assert read_size(written(tmp_path, content), "sources.a").quantised_bits == bits


def test_the_operations_of_a_forward_pass_are_counted() -> None:
    size = ModelSize(
        parameters=1000,
        multiplied=700,
        embedding=200,
        head=100,
        layers=3,
        hidden_size=8,
        ffn_width=16,
        heads=2,
        key_value_heads=1,
        head_dim=4,
        vocab_size=25,
    )
    # Weights: 2 x 700 x 10 and 2 x 100 x 6. A token sees 5 others on average, in 3 layers with 2 heads, by
    # two products of 4 elements: 2 x 2 x 4 operations.
    assert size.forward_flops(10, 10, 6) == 14000 + 1200 + 10 * 5 * 3 * 2 * 16
    assert size.cached == 2 * 3 * 1 * 4


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    directory = written(tmp_path, {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"]})
    with pytest.raises(UserError, match=r"config\.json"):
        read_size(directory, "sources.a")


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    directory = written(tmp_path, {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 64})
    with pytest.raises(UserError, match="does not state num_attention_heads"):
        read_size(directory, "sources.a")
