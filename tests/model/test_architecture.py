"""Configs are read as transformers reads them; what the target could not reproduce, or a layout not hold,
is refused early.
"""

import json
from types import SimpleNamespace

import pytest
import small_targets as small
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from megatron_fuse.errors import UserError
from megatron_fuse.model import config as config_module
from megatron_fuse.model.architecture import check_layout, read_architecture
from megatron_fuse.model.config import transformer_config

VICUNA_7B = {  # config.json of lmsys/vicuna-7b-v1.5, as published
    "_name_or_path": "vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}


def write_config(directory, **changes):
    config = {**VICUNA_7B, **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_vicuna_7b(tmp_path):
    architecture = read_architecture(write_config(tmp_path))
    assert (architecture.num_layers, architecture.num_query_groups, architecture.head_dim) == (32, 32, 128)
    assert (architecture.vocab_size, architecture.padded_vocab_size) == (32000, 32000)
    assert (
        not architecture.tied_embeddings and not architecture.qkv_bias and architecture.sliding_window is None
    )
    check_layout(architecture, tensor_model_parallel_size=8, pipeline_model_parallel_size=4, seq_length=2048)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        LlamaConfig(
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        ),  # Vicuna's 16k variant
        LlamaConfig(head_dim=96, rope_parameters=small.LLAMA3_ROPE),
        # Llama 3.1 as published, in the form of transformers 4
        LlamaConfig(
            rope_theta=500000.0,
            max_position_embeddings=131072,
            rope_scaling={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        ),
        MistralConfig(head_dim=160),
        Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        LlamaConfig(rope_theta=10000.0, rope_scaling={"type": "dynamic", "factor": 2.0}),
        Qwen2Config(rope_parameters=small.YARN_ROPE),
        # with the attention scale that DeepSeek's configs state, and with one stated outright
        LlamaConfig(rope_parameters=small.YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.0}),
        LlamaConfig(rope_parameters=small.YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 16.0}),
        small.small_config("phi3"),
        Phi3Config(
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            pad_token_id=None,
        ),
    ],
    ids=[
        "default",
        "linear",
        "llama3",
        "llama3.1",
        "mistral",
        "qwen2",
        "dynamic",
        "yarn",
        "yarn-mscale",
        "yarn-factor",
        "longrope-partial",
        "partial",
    ],
)
def test_inverse_frequencies_are_those_of_transformers_to_the_bit(config):
    theirs = (Phi3RotaryEmbedding if isinstance(config, Phi3Config) else LlamaRotaryEmbedding)(config)
    architecture = read_architecture(config)
    ours = torch.tensor(architecture.inverse_frequencies, dtype=torch.float32)
    assert torch.equal(ours, theirs.inv_freq)
    assert architecture.rotation_scale == theirs.attention_scaling


def test_each_kind_of_layer_has_the_frequencies_of_transformers_to_the_bit():
    config = small.small_config("gemma3")
    architecture, theirs = read_architecture(config), Gemma3RotaryEmbedding(config)
    assert architecture.inverse_frequencies == tuple(theirs.full_attention_inv_freq.tolist())
    assert architecture.local_inverse_frequencies == tuple(theirs.sliding_attention_inv_freq.tolist())


def test_longrope_beyond_its_short_frequencies_is_refused():
    architecture = read_architecture(small.small_config("phi3"))
    check_layout(architecture, seq_length=64)
    with pytest.raises(UserError, match=r"65 is longer than original_max_position_embeddings \(64\)"):
        check_layout(architecture, seq_length=65)


@pytest.mark.parametrize("name", small.NAMES)
def test_a_config_reads_the_same_from_disk(tmp_path, name):
    config = small.small_config(name)
    config.architectures = [read_architecture(config).family]
    config.save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == read_architecture(config)


# The keys of transformers 4, in which the published configs are
OLD_ROPE = {
    "qwen3": {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "phi3": {
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": small.LONGROPE["short_factor"],
            "long_factor": small.LONGROPE["long_factor"],
        },
    },
    "gemma3": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


@pytest.mark.parametrize("name", OLD_ROPE)
def test_rotations_in_the_old_form_read_the_same(tmp_path, name):
    config = small.small_config(name)
    family = read_architecture(config).family
    old = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(old | OLD_ROPE[name] | {"architectures": [family]}))
    assert read_architecture(tmp_path) == read_architecture(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architectures": ["MptForCausalLM"], "model_type": "mpt"},
            "MptForCausalLM is not supported\. Choose .*Qwen2",
        ),
        ({"architectures": ["NoSuchClass"], "model_type": "nobody"}, "NoSuchClass"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["MistralForCausalLM"]}, r"MistralForCausalLM \(model_type llama\)"),
        ({"architectures": ...}, "no key 'architectures'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3.*num_attention_heads \(32\)"),
        ({"head_dim": 33}, "head_dim: must be a multiple of 2, not 33"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rope type 'proportional'"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_reproduced_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as caught:
        read_architecture(write_config(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("llama2", "rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("qwen3", "attention_bias", True, "attention_bias is True"),
        ("smollm3", "mlp_bias", True, "mlp_bias is True"),
        ("smollm3", "no_rope_layers", [1, 0], "no_rope_layers has 2 values, but num_hidden_layers is 4"),
        ("phi3", "resid_pdrop", 0.1, "resid_pdrop is 0.1"),
        ("phi3", "rope_parameters", {"partial_rotary_factor": 0.7}, "0.7 of head_dim 16 is 11 channels"),
        ("olmo2", "attention_bias", True, "attention_bias is True"),
        ("olmo2", "clip_qkv", 8.0, "clip_qkv is 8.0"),
        ("gemma3", "hidden_activation", "gelu", "hidden_activation is 'gelu'"),
        ("gemma2", "hidden_activation", "gelu", "hidden_activation is 'gelu'"),
        ("gemma2", "attn_logit_softcapping", 0.0, "attn_logit_softcapping"),
        ("gemma3", "sliding_window", None, "sliding_window"),
        ("gemma3", "rope_parameters", {"full_attention": small.YARN_ROPE}, "rotations of different scales"),
        ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention"),
        ("mixtral", "router_jitter_noise", 0.1, "router_jitter_noise is 0.1"),
        ("mixtral", "num_experts_per_tok", 5, "num_experts_per_tok is 5, but a layer has 4 experts"),
        ("mixtral", "num_experts_per_tok", 1, "num_experts_per_tok is 1.* at least 2"),
        ("qwen3_moe", "decoder_sparse_step", 2, "decoder_sparse_step is 2"),
        ("qwen3_moe", "mlp_only_layers", [1], r"mlp_only_layers is \[1\]"),
        ("olmoe", "clip_qkv", 8.0, "clip_qkv is 8.0"),
    ],
)
def test_an_option_of_a_family_that_cannot_be_reproduced_is_refused(name, key, value, said):
    config = small.small_config(name)
    setattr(config, key, config.rope_parameters | value if key == "rope_parameters" else value)
    with pytest.raises(UserError, match=said):
        read_architecture(config)


@pytest.mark.parametrize("name", small.NAMES)
def test_transformer_engine_takes_the_families_whose_parts_it_has(monkeypatch, name):
    monkeypatch.setattr(config_module, "resolve_transformer_impl", lambda _: "transformer_engine")
    monkeypatch.setattr(
        config_module, "TransformerConfig", SimpleNamespace
    )  # which would look for the library
    architecture = read_architecture(small.small_config(name))
    only_local = {
        "olmoe": "query and key norms over all heads",
        "olmo2": "norms after attention and MLP and query and key norms over all heads",
        "gemma3": "norms after attention and MLP and two kinds of rotations",
        "gemma2": "norms after attention and MLP and soft-capped attention scores",
    }
    chosen = transformer_config(architecture, transformer_impl="auto").transformer_impl
    assert chosen == ("local" if name in only_local else "transformer_engine")
    if name in only_local:
        with pytest.raises(UserError, match=only_local[name]):
            transformer_config(architecture, transformer_impl="transformer_engine")


@pytest.mark.parametrize(
    ("text", "said"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "holds a JSON list")]
)
def test_a_missing_or_broken_config_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_architecture(tmp_path)


def test_a_config_object_of_another_class_is_refused():
    with pytest.raises(UserError, match="gpt2"):
        read_architecture(GPT2Config())


# 1003: odd; 1024: a multiple already; 1: less than one multiple; 32001: one token was added
@pytest.mark.parametrize(("vocab_size", "padded"), [(1003, 1024), (1024, 1024), (1, 128), (32001, 32128)])
def test_the_vocabulary_is_padded_to_the_next_multiple_of_128(vocab_size, padded):
    assert read_architecture(LlamaConfig(vocab_size=vocab_size)).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"expert_model_parallel_size": 3}, r"3 does not divide the 8 experts .*Choose one of 1, 2, 4, 8\.$"),
        (
            {
                "tensor_model_parallel_size": 2,
                "expert_tensor_parallel_size": 8,
            },
            r"8 does not divide the width of an expert \(36\)",
        ),
    ],
)
def test_a_layout_of_experts_that_cannot_be_is_refused(layout, said):
    with pytest.raises(UserError, match=said):
        check_layout(read_architecture(small.small_config("qwen3_moe")), **layout)


@pytest.mark.parametrize("option", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_experts_of_a_dense_model_are_refused(option):
    with pytest.raises(UserError, match="has no experts"):
        check_layout(read_architecture(small.small_config("mistral")), **{option: 2})


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            {"tensor_model_parallel_size": 3},
            r"3 does not divide num_attention_heads \(4\).*Choose one of 1, 2\.$",
        ),
        (
            {"tensor_model_parallel_size": 4},
            r"4 does not divide num_key_value_heads \(2\).*Choose one of 1, 2\.$",
        ),
        ({"tensor_model_parallel_size": 0}, "at least 1"),
        ({"pipeline_model_parallel_size": 5}, r"5 is more than the 4 layers of the model"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            "2 x .* 4 does not divide",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs --pipeline-model-parallel-size of at least 2"),
        ({"seq_length": 129}, r"129 is longer than max_position_embeddings \(128\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout, said):
    with pytest.raises(UserError, match=said):
        check_layout(read_architecture(small.small_config("mistral")), **layout)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "seq_length": 33},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": 1},
    ],
)
def test_a_layout_that_can_be_is_accepted(layout):
    check_layout(read_architecture(small.small_config("mistral")), **layout)


# Megatron would split either: heads 6 over TP 3, but not this feed-forward network, nor 128 columns
@pytest.mark.parametrize(
    ("ffn", "vocab", "said"), [(172, 384, "intermediate_size"), (174, 128, "padded vocabulary")]
)
def test_every_sharded_dimension_is_checked(ffn, vocab, said):
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, intermediate_size=ffn, vocab_size=vocab)
    with pytest.raises(UserError, match=said):
        check_layout(read_architecture(config), tensor_model_parallel_size=3)


# As transformers' attention has it: Mistral in every layer, Qwen2 only where asked and from max_window_layers
# on, Llama never.
@pytest.mark.parametrize(
    ("config", "window", "layers"),
    [
        (LlamaConfig(num_hidden_layers=3), None, (False,) * 3),
        (MistralConfig(num_hidden_layers=3, sliding_window=4096), 4096, (True,) * 3),
        (MistralConfig(num_hidden_layers=3, sliding_window=None), None, (False,) * 3),
        (Qwen2Config(num_hidden_layers=3, sliding_window=64, max_window_layers=0), None, (False,) * 3),
        (
            Qwen2Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=64, max_window_layers=2),
            64,
            (False, False, True),
        ),
        (
            Qwen2Config(
                num_hidden_layers=2,
                use_sliding_window=True,
                sliding_window=64,
                layer_types=["sliding_attention", "full_attention"],
            ),
            64,
            (True, False),
        ),
        # A window that use_sliding_window does not turn on, and Llama's, which its class does not read
        (Qwen3Config(num_hidden_layers=2, sliding_window=64), None, (False,) * 2),
        (LlamaConfig(num_hidden_layers=2, sliding_window=64), None, (False,) * 2),
        (
            SmolLM3Config(
                num_hidden_layers=2, use_sliding_window=True, sliding_window=64, no_rope_layer_interval=2
            ),
            64,
            (False, True),
        ),
        (Phi3Config(num_hidden_layers=2, sliding_window=64), 64, (True,) * 2),
    ],
)
def test_windows_are_those_of_transformers(config, window, layers):
    architecture = read_architecture(config)
    assert (architecture.sliding_window, architecture.sliding_layers) == (window, layers)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(UserError, match="sliding_window: must be greater than or equal to 1, not 0"):
        read_architecture(MistralConfig(sliding_window=0))
