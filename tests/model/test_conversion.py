"""Weights go in and out without losing a bit, every element of every tensor has its one place, and damage
is named.
"""

# ruff: noqa: F401, F811  (small_models is a fixture, imported and then named as an argument)

import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import small_targets as small
import torch
from log_lines import logged
from safetensors.torch import load_file, save_file
from small_targets import small_models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.carried_files import write_beside_weights
from megatron_fuse.model.expected_weights import hugging_face_shapes
from megatron_fuse.model.families import layer_weights
from megatron_fuse.model.weight_blocks import weight_blocks
from megatron_fuse.model.weight_files import DTYPES, WeightFiles

NORMS_UNDER_TRANSFORMER_ENGINE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def parameter_names(architecture):
    per_layer = layer_weights(architecture)
    yield "embedding.word_embeddings.weight"
    yield from (f"decoder.layers.{i}.{name}" for i in range(architecture.num_layers) for name in per_layer)
    yield "decoder.final_layernorm.weight"
    if not architecture.tied_embeddings:
        yield "output_layer.weight"


# TP 4 with vocabulary 130 leaves one rank with two real columns and one with none
@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("name", [*small.NAMES, "mostly padding"])
def test_every_element_lies_on_exactly_one_rank(name, tensor_size):
    tiny = {"hidden_size": 128, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = small.small_config("llama2" if name == "mostly padding" else name)
    vocab_size = 130 if name == "mostly padding" else 515
    for key, value in {**tiny, "num_key_value_heads": 4, "vocab_size": vocab_size}.items():
        setattr(config, key, value)
    architecture = read_architecture(config)
    shapes = hugging_face_shapes(architecture)
    copies = {tensor: np.zeros(shape, int) for tensor, shape in shapes.items()}
    for rank in range(tensor_size):
        for parameter in parameter_names(architecture):
            end = 0
            for block in weight_blocks(parameter, architecture, rank, tensor_size):
                assert block.at == end, "blocks follow one another in the parameter"
                end += block.size
                place = (slice(None),) * block.dim + (slice(block.start, block.start + block.size),)
                copies[block.tensor][place] += 1
    of_all_heads = ("q_norm", "k_norm") if architecture.query_key_norm == "all heads" else ("none",)
    split = {
        tensor
        for tensor in shapes
        if not any(name in tensor for name in ("norm", "gate.weight"))
        or any(name in tensor for name in of_all_heads)
    }
    for tensor, count in copies.items():
        assert (count == (1 if tensor in split else tensor_size)).all(), tensor


def test_names_under_transformer_engine_mean_the_same():
    architecture = read_architecture(small.small_config("qwen2"))
    for local, engine in NORMS_UNDER_TRANSFORMER_ENGINE.items():
        blocks = [weight_blocks(f"decoder.layers.3.{name}", architecture, 1, 2) for name in (local, engine)]
        assert blocks[0] == blocks[1]


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError):
        weight_blocks("decoder.layers.0.mlp.router.weight", read_architecture(LlamaConfig()), 0, 1)


@pytest.mark.parametrize("name", small.NAMES)
def test_shapes_are_those_that_transformers_writes(small_models, name):
    files = WeightFiles(small_models[name])
    assert {tensor: files.shape(tensor) for tensor in files.file_of} == hugging_face_shapes(
        read_architecture(small_models[name])
    )


def load_and_export(model_dir, output_dirs):
    """On a rank: loads model_dir and saves it in every way asked for; output_dirs: directory -> (dtype,
    bytes per shard).
    """
    from test_gpt_model import start

    from megatron_fuse.model.conversion import (
        hugging_face_state_dict,
        load_hugging_face_weights,
        save_hugging_face_model,
    )
    from megatron_fuse.model.gpt import build_model

    architecture, config = start((1, 1, None), model_dir)
    model = build_model(architecture, config, seq_length=small.SEQUENCE)
    load_hugging_face_weights([model], model_dir)
    for output_dir, (dtype, shard_bytes) in output_dirs.items():
        save_hugging_face_model(model, model_dir, output_dir, dtype, shard_bytes)
    return {name: tensor.numpy() for name, tensor in hugging_face_state_dict(model).items()}


@pytest.mark.parametrize("name", small.NAMES)
def test_an_export_returns_every_bit(ranks, small_models, tmp_path, name):
    outputs = {tmp_path / "whole": ("fp32", 10**9), tmp_path / "sharded": ("fp32", 200_000)}
    state = ranks(1, load_and_export, small_models[name], outputs)[0]
    original = load_file(small_models[name] / "model.safetensors")
    assert state.keys() == original.keys()
    assert all(np.array_equal(state[key], original[key].numpy()) for key in original)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    for output in outputs:
        files = WeightFiles(output)
        assert files.file_of.keys() == original.keys()
        for key, tensor in original.items():
            assert torch.equal(files.read(key, 0, 0, tensor.shape[0]), tensor), key
        model, problems = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not problems["missing_keys"] and not problems["unexpected_keys"]
        reference = AutoModelForCausalLM.from_pretrained(small_models[name])
        ids = small.random_batches(model.config.vocab_size, 0)[0]["ids"]
        assert torch.equal(model(ids).logits, reference(ids).logits)


def exported_lines(model_dir, output_dirs):
    """What is said of exports of model_dir in each dtype; output_dirs: directory -> dtype."""
    from test_gpt_model import start

    from megatron_fuse.model.conversion import load_hugging_face_weights, save_hugging_face_model
    from megatron_fuse.model.gpt import build_model

    architecture, config = start((1, 1, None), model_dir)
    model = build_model(architecture, config, seq_length=small.SEQUENCE)
    load_hugging_face_weights([model], model_dir)
    lines = {}
    for output_dir, dtype in output_dirs.items():
        with logged("warning") as said:
            save_hugging_face_model(model, model_dir, output_dir, dtype)
        lines[dtype] = said.getvalue().splitlines()
    return lines


def test_an_export_says_where_it_rounds(ranks, small_models, tmp_path):
    outputs = {tmp_path / dtype: dtype for dtype in ("fp32", "bf16", "fp16")}
    lines = ranks(1, exported_lines, small_models["llama2"], outputs)[0]
    original = load_file(small_models["llama2"] / "model.safetensors")
    assert lines.pop("fp32") == []
    for dtype, (line,) in lines.items():
        lost = sum(not torch.equal(tensor.to(DTYPES[dtype]).float(), tensor) for tensor in original.values())
        assert lost > 0
        assert line.startswith(
            f"warning: {lost} of {len(original)} tensors are rounded to {dtype}: fp32 keeps"
        )
    again = ranks(1, exported_lines, tmp_path / "bf16", {tmp_path / "again": "bf16"})[0]
    assert again == {"bf16": []}  # what has been rounded stays


def exports_of_large_values(model_dir, output_dir):
    """Three exports (fp16, bf16, fp32) each of a model with a first, second and third value put in: the
    error, or None.
    """
    from test_gpt_model import start

    from megatron_fuse.model.conversion import load_hugging_face_weights, save_hugging_face_model
    from megatron_fuse.model.gpt import build_model

    architecture, config = start((1, 1, None), model_dir)
    model = build_model(architecture, config, seq_length=small.SEQUENCE)
    load_hugging_face_weights([model], model_dir)
    said = []
    for value in (65504.0, -7e4, float("nan")):
        next(iter(model.parameters())).data.flatten()[3] = value
        said.append([])
        for dtype in ("fp16", "bf16", "fp32"):
            output = output_dir / f"{value} {dtype}"
            try:
                save_hugging_face_model(model, model_dir, output, dtype)
                said[-1].append(None)
            except UserError as error:
                said[-1].append(str(error))
            assert output.exists() == (said[-1][-1] is None)
    return said


def test_values_that_a_dtype_cannot_hold_are_not_exported(ranks, small_models, tmp_path):
    largest, larger, none = ranks(1, exports_of_large_values, small_models["llama2"], tmp_path)[0]
    assert largest == [None] * 3
    assert larger[1:] == [None] * 2
    assert larger[0].startswith(
        "model.embed_tokens.weight of the model to export has values up to 70000, which fp16 cannot"
    )
    assert all("holds NaN or infinite weights" in message for message in none)


def test_an_export_carries_what_the_tokenizer_needs_and_says_its_dtype(ranks, small_models, tmp_path):
    reference = Path(shutil.copytree(small_models["llama2"], tmp_path / "reference"))
    carried = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
    )
    for file in (*carried, "training_args.bin", "README.md"):
        (reference / file).write_text(f"the reference's {file}")
    (reference / "additional_chat_templates").mkdir()
    (reference / "additional_chat_templates" / "tools.jinja").write_text("tools")
    ranks(
        1,
        load_and_export,
        reference,
        {tmp_path / "out" / "bf16": ("bf16", 10**9), tmp_path / "fp16": ("fp16", 10**9)},
    )

    for output, dtype in ((tmp_path / "out" / "bf16", torch.bfloat16), (tmp_path / "fp16", torch.float16)):
        for file in carried:
            assert (output / file).read_text() == f"the reference's {file}"
        assert (output / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
        assert (output / "generation_config.json").exists()
        assert not (output / "training_args.bin").exists() and not (output / "README.md").exists()
        config = json.loads((output / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
        original = load_file(reference / "model.safetensors")
        for key, tensor in load_file(output / "model.safetensors").items():
            assert torch.equal(tensor, original[key].to(dtype)), key
    assert not list(tmp_path.glob("**/.*.tmp"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_config_beside_plain_weights_says_their_type_and_no_quantisation(small_models, tmp_path, dtype):
    """Before transformers 5 a loader knows torch_dtype alone, and it would quantise by a leftover
    quantization_config.
    """
    reference = Path(shutil.copytree(small_models["llama2"], tmp_path / "reference"))
    path = reference / "config.json"
    given = json.loads(path.read_text()) | {
        "torch_dtype": "float64",
        "quantization_config": {"quant_method": "gptq"},
    }
    path.write_text(json.dumps(given))
    (tmp_path / "out").mkdir()
    with logged() as text:
        write_beside_weights(reference, tmp_path / "out", dtype)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    del given["quantization_config"]
    assert written == given | {"dtype": name, "torch_dtype": name}
    assert text.getvalue() == (
        f"warning: config.json: quantization_config of {reference} left out: the weights written are plain "
        f"{dtype}\n"
    )
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == getattr(torch, name) and getattr(config, "quantization_config", None) is None


def test_torch_files_are_read_like_safetensors(ranks, small_models, tmp_path):
    """lmsys/vicuna-7b-v1.5 is published in two .bin shards, with buffers that transformers no longer has."""
    original = load_file(small_models["llama2"] / "model.safetensors")
    shutil.copy(small_models["llama2"] / "config.json", tmp_path)
    held = {**original, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    names = list(held)
    shards = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in shards.items():
        torch.save({name: held[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    state = ranks(1, load_and_export, tmp_path, {})[0]
    assert state.keys() == original.keys()
    assert all(np.array_equal(state[key], original[key].numpy()) for key in original)


def refusals(cases):
    """On a rank: the message with which each directory of weights is refused, or None."""
    from test_gpt_model import start

    from megatron_fuse.model.conversion import load_hugging_face_weights
    from megatron_fuse.model.gpt import build_model

    messages = []
    for directory in cases:
        architecture, config = start((1, 1, None), directory)
        model = build_model(architecture, config, seq_length=small.SEQUENCE)
        try:
            load_hugging_face_weights([model], directory)
            messages.append(None)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_weights_that_do_not_fit_the_config_are_refused_by_name(ranks, small_models, tmp_path):
    down, bias = "model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.bias"
    embedding = "model.embed_tokens.weight"

    def case(number, name, change):
        directory = Path(shutil.copytree(small_models[name], tmp_path / str(number)))
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    cases = [
        (case(0, "llama2", lambda t: t.pop(down)), f"does not have the tensor {down}"),
        (case(1, "llama2", lambda t: t.update({bias: torch.ones(64)})), f"holds the tensor {bias}"),
        (
            case(2, "llama2", lambda t: t.update({down: torch.ones(172, 64)})),
            r"has shape \[172, 64\].*needs \[64, 172\]",
        ),
        (
            case(3, "llama2", lambda t: t.update({embedding: torch.ones(1004, 64)})),
            r"\[1004, 64\].*\[1003, 64\]",
        ),
        (
            case(4, "qwen2", lambda t: [t.pop(key) for key in list(t) if key.endswith("bias")]),
            "and 11 more tensors",
        ),
        (
            case(5, "qwen2", lambda t: t.update({"lm_head.weight": t[embedding].clone()})),
            None,
        ),  # tied, and stored twice
        (
            case(6, "qwen2", lambda t: t.update({"lm_head.weight": t[embedding] + 1})),
            "Set tie_word_embeddings to false",
        ),
    ]
    messages = ranks(1, refusals, [directory for directory, _ in cases])[0]
    for (directory, said), message in zip(cases, messages, strict=True):
        if said is None:
            assert message is None
        else:
            assert message is not None, f"{directory} was accepted, though it should be refused with {said!r}"
            with pytest.raises(UserError, match=said):
                raise UserError(message)
            assert str(directory) in message


def damage(directory, kind):
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    if kind == "no index entry":
        index = {"metadata": {}}
    elif kind == "misplaced":
        save_file({"b": torch.ones(2)}, directory / "model-00001-of-00001.safetensors")
    elif kind == "cut short":
        save_file({"a": torch.ones(1000)}, directory / "model-00001-of-00001.safetensors")
        path = directory / "model-00001-of-00001.safetensors"
        path.write_bytes(path.read_bytes()[:500])
    if kind != "empty":
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "holds no weights: it needs one of model.safetensors"),
        ("no index entry", "model.safetensors.index.json: weight_map: missing"),
        ("missing shard", "model-00001-of-00001.safetensors is missing"),
        ("misplaced", "model-00001-of-00001.safetensors does not have a, which the index places there"),
        ("cut short", "model-00001-of-00001.safetensors is cut off"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, kind, said):
    damage(tmp_path, kind)
    with pytest.raises(UserError, match=said):
        files = WeightFiles(tmp_path)
        files.shape(next(iter(files.file_of)))


# what torch.load would call is looked up in the pickle, whichever of its refusals names it; `os` is on a list
# of its own
PICKLES = {
    "code": ({"w": torch.ones(2), "share": Fraction(1, 2)}, r"reading it would run fractions\.Fraction"),
    "blocked code": ({"w": torch.ones(2), "run": os.system}, r"reading it would run posix\.system"),
    "a module": (torch.nn.Linear(1, 1), r"reading it would run torch\.nn\.modules\.linear\.Linear"),
    "a step": ({"w": torch.ones(2), "step": 3}, r"'step' is a int"),
    "nested": ({"model": {"w": torch.ones(2)}}, r"'model' is a dict"),
    "a number for a name": ({0: torch.ones(2)}, r"0 is a Tensor"),
    "a list": ([torch.ones(2)], r"its top level is a list"),
}


@pytest.mark.parametrize("indexed", [False, True], ids=["single", "indexed"])
@pytest.mark.parametrize("zipped", [False, True], ids=["before torch 1.6", "zip"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_of_more_than_named_tensors_is_refused(tmp_path, kind, zipped, indexed):
    content, said = PICKLES[kind]
    file = "pytorch_model-00001-of-00001.bin" if indexed else "pytorch_model.bin"
    torch.save(content, tmp_path / file, _use_new_zipfile_serialization=zipped)
    if indexed:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(
        UserError,
        match=rf"{tmp_path / file} holds not only named tensors \({said}\)\. Save .* safetensors\.$",
    ):
        WeightFiles(tmp_path).shape("w")


def export_refusals(model_dir, other_dir, output_dir, existing_dir):
    from test_gpt_model import start

    from megatron_fuse.model.conversion import save_hugging_face_model
    from megatron_fuse.model.gpt import build_model

    architecture, config = start((1, 1, None), model_dir, perform_initialization=True)
    model = build_model(architecture, config, seq_length=small.SEQUENCE)
    messages = []
    for reference, output, dtype in (
        (model_dir, output_dir, "int4"),
        (model_dir, existing_dir, "bf16"),
        (other_dir, output_dir, "bf16"),
    ):
        try:
            save_hugging_face_model(model, reference, output, dtype)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_an_export_that_cannot_be_leaves_nothing_behind(ranks, small_models, tmp_path):
    existing = tmp_path / "existing"
    existing.mkdir()
    arguments = (small_models["llama2"], small_models["mistral"], tmp_path / "out", existing)
    dtype, exists, other = ranks(1, export_refusals, *arguments)[0]
    assert "'int4'. Choose one of fp32, bf16, fp16" in dtype
    assert f"{existing} already exists" in exists
    assert "family 'LlamaForCausalLM', but" in other and "'MistralForCausalLM'" in other
    assert [path.name for path in tmp_path.iterdir()] == ["existing"]


def whole_model_only(model_dir):
    from test_gpt_model import start

    from megatron_fuse.model.conversion import hugging_face_state_dict
    from megatron_fuse.model.gpt import build_model

    architecture, config = start((2, 1, None), model_dir)
    try:
        hugging_face_state_dict(build_model(architecture, config, seq_length=small.SEQUENCE))
    except ValueError as error:
        return str(error)
    return None


def test_a_part_of_a_model_is_not_exported(ranks, small_models):
    assert all(
        "only a whole model" in message for message in ranks(2, whole_model_only, small_models["qwen2"])
    )
