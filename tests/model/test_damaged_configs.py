"""Impossible configs, and damaged files beside a model, are refused by file and key, before memory is
taken.
"""

import os
from pathlib import Path

import pytest
from config_files import CONFIG, Change, refusal, write_config

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.limits import declared_vocab_size
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.config_file import check_model_directory, load_config

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # The types that JSON has and the key has not.
        (MISTRAL | {"sliding_window": "4"}, "sliding_window: .* not '4'"),
        ({"architectures": {}}, "architectures: "),
        ({"architectures": [5]}, "architectures.0: .* not 5"),
        ({"hidden_size": 64.0}, "hidden_size: .* not 64.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: .* not True"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: .* not 'false'"),  # which was taken for true
        ({"rope_theta": "x"}, "rope_theta: .* not 'x'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": [2.0]}}, "factor"),
        ({"rope_scaling": [2.0]}, "rope_scaling: "),
        ({"torch_dtype": "float99"}, "torch_dtype: .* not 'float99'"),
        # Values that no model can have.
        ({"head_dim": -1}, "head_dim: .* not -1"),
        ({"head_dim": 33}, "head_dim: .* multiple of 2, not 33"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: .* not 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: .* not 1000000000"),
        ({"vocab_size": -1}, "vocab_size: .* not -1"),
        ({"hidden_size": 10**9}, "hidden_size: .* not 1000000000"),
        (
            {"hidden_size": 66},
            "hidden_size: .*not a multiple of the number of attention heads .4.",
        ),  # transformers' words
        (MISTRAL | {"hidden_size": 66}, "hidden_size is 66, .* multiple of num_attention_heads .4."),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, .* divisor of num_attention_heads .4."),
        ({"max_position_embeddings": 0}, "max_position_embeddings: .* not 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: .* not nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: .* not 0"),
        ({"rms_norm_eps": 1e-320}, "rms_norm_eps: .* not 1e-320"),
        ({"rope_theta": 0}, "rope_theta: .* not 0"),
        ({"rope_theta": float("inf")}, "rope_theta: .* not inf"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor: .* not 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "rope_scaling.factor: .* not -1.0"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "low_freq_factor .1.0. .* high_freq_factor .1.0.",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings: ",
        ),
        (
            {"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_type"}},
            "factor is 8.0.*rope_type",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0}}},
            "full_attention: factor: .* not 0",
        ),
        # What transformers would fill in or compute, and a target would not.
        ({"rms_norm_eps": ...}, "rms_norm_eps: missing"),
        ({"vocab_size": ...}, "vocab_size: missing"),
        ({"is_causal": False}, "is_causal: .* not False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: "),
        ({"per_layer_config": {"0": {"sliding_window": 4}}}, "per_layer_config: "),
        ({"configuration_files": ["config.5.0.json"]}, "configuration_files: "),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types is .*sliding_attention"),
        (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types"),
        # Files that hold no config.
        ("", "not valid JSON.*line 1"),
        ("[]", "holds a JSON list, but must hold an object"),
        ('{"model_type": "llama"', "not valid JSON.*line 1"),
        ('{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' is given twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 64 deep in line 1"),
        ('{"a":\n' + "9" * 5000 + "}", "an integer of 5000 digits in line 2"),
        ('{"a": "\\ud800"}', r"a is '\\ud800'"),
        (b'{\n"a": "caf\xe9"}', "line 2 is not UTF-8"),
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "is not a regular file"),  # which would be read for ever
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (huge, "has 1099511627776 bytes"),
    ],
    ids=lambda value: None if callable(value) else str(value)[:50],
)
def test_a_config_that_cannot_be_meant_is_refused_by_its_key(
    tmp_path: Path, change: Change, said: str
) -> None:
    message = refusal(lambda: read_architecture(write_config(tmp_path, change)))
    assert str(tmp_path / "config.json") in message
    with pytest.raises(UserError, match=said):
        raise UserError(message)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers: .* not -1"),
        ({"n_positions": 0}, "n_positions: .* not 0"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon: .* not -1e-05"),
        ({"text_config": {"vocab_size": "9"}}, "text_config: vocab_size: .* not '9'"),
        ({"rope_scaling": {"type": "no_such_scaling", "factor": 2.0}}, "rope_type.*no_such_scaling"),
        ({"model_type": "no_such_model"}, "model_type: .*no_such_model"),
        ({"id2label": 5}, "id2label"),  # which transformers itself meets with an AttributeError
    ],
)
def test_configs_of_any_family_are_checked(tmp_path: Path, change: Change, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(write_config(tmp_path, change))


def test_a_config_of_several_parts_states_the_texts_sizes(tmp_path: Path) -> None:
    assert declared_vocab_size(write_config(tmp_path, {"text_config": {"vocab_size": 99}})) == 99
    assert declared_vocab_size(write_config(tmp_path, {"text_config": {}})) == CONFIG["vocab_size"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "generation_config.json",
            "{",
            "generation_config.json: not valid JSON",
        ),  # which transformers skips in silence
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id: .* not '</s>'"),
        ("generation_config.json", '{"temperature": -1}', "temperature: .* not -1"),
        ("adapter_config.json", "{}", "adapter_config.json: there is an adapter beside a whole model"),
    ],
)
def test_what_lies_beside_a_model_is_checked(tmp_path: Path, name: str, text: str, said: str) -> None:
    write_config(tmp_path, {})
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        check_model_directory(tmp_path)
