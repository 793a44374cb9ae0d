"""A GGUF file becomes a model directory by one command, and is refused with that command wherever a model
is named.
"""

import json
import runpy
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import save_model, small_recipe, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.gguf import convert_gguf
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.weight_files import DTYPES
from megatron_fuse.pipeline import check_files
from megatron_fuse.tokenization import load_tokenizer

ROOT = Path(__file__).parents[2]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "original", "llama")


def write_gguf(
    model: Path,
    file: Path,
    *,
    quantised: bool = False,
    tokens: Mapping[int, tuple[str, int]] = {},
    keys: Mapping[str, object] = {},
    tensors: Sequence[str] = (),  # further ones, of half a head
) -> Path:
    """A Llama as llama.cpp writes it: the two halves of every head's queries and keys are interleaved."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'megatron-fuse[gguf]'")
    config, tokenizer = AutoConfig.from_pretrained(model), load_tokenizer(model)
    heads, size = config.num_attention_heads, tokenizer.vocab_size
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    texts = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(list(range(size)))
    written = [(text, 1) for text in texts] + [
        (f"[PAD{number}]", 5) for number in range(size, config.vocab_size)
    ]
    written = [tokens.get(token, one) for token, one in enumerate(written)]
    writer.add_token_list([text for text, _ in written])
    writer.add_token_types([kind for _, kind in written])
    for key, value in keys.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name in tensors:
        writer.add_tensor(name, np.full(config.hidden_size // heads // 2, 2.0, np.float32))
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.float().numpy()
        base = name.removesuffix(".weight")
        if base.endswith(("q_proj", "k_proj")):
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if base not in WHOLE:
            _, _, layer, inner = base.split(".", 3)
            base = f"blk.{layer}.{NAMES[inner]}"
        values, kind = np.ascontiguousarray(values), None
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:  # a block of Q8_0
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{WHOLE.get(base, base)}.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_converted_with_the_original_tokenizer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file, output = write_gguf(model, tmp_path / "x.gguf"), tmp_path / "out"
    words = ["--from-gguf", str(file), "--tokenizer", str(model), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
    assert end.value.code == 0, capsys.readouterr().err
    assert "dequantised, in fp32" in capsys.readouterr().err
    assert resolve_model(str(output), "target.model") == output
    assert not hasattr(AutoConfig.from_pretrained(output), "quantization_config")
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert load_tokenizer(output).sha256 == load_tokenizer(model).sha256
    before, after = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    assert (
        all(torch.equal(after[name], tensor) for name, tensor in before.items())
        and after.keys() == before.keys()
    )
    ids = torch.arange(4, 20)[None]
    logits = [AutoModelForCausalLM.from_pretrained(one)(ids).logits for one in (model, output)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quantised_weights_become_plain_ones(model: Path, tmp_path: Path, dtype: str) -> None:
    convert_gguf(write_gguf(model, tmp_path / "x.gguf", quantised=True), model, tmp_path / "out", dtype)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {DTYPES[dtype]}
    for name, tensor in before.items():
        error, largest = (after[name].float() - tensor).abs().max(), tensor.abs().max()
        # Half a step of 127 to the largest, the fp16 of that step, and what bf16 rounds
        assert error <= largest * (0.5 / 127 + 2**-10 + 2**-8 * (dtype == "bf16")), name
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"].float())
    convert_gguf(tmp_path / "x.gguf", model, tmp_path / "again")
    with pytest.raises(UserError, match="again already exists"):
        convert_gguf(tmp_path / "x.gguf", model, tmp_path / "again")


def test_a_tokenizer_that_is_not_the_files_is_refused(model: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "x.gguf")
    other = save_model(tmp_path / "other", "llama")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"--tokenizer: id \d+ is '[ab]' in .*other, but '[ab]' in .*x\.gguf"):
        convert_gguf(file, other, tmp_path / "out")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"--tokenizer: .*other cannot be read"):
        convert_gguf(file, other, tmp_path / "out")
    more = save_model(tmp_path / "more", "llama")
    small = write_gguf(save_model(tmp_path / "small", "llama", vocab_size=280), tmp_path / "small.gguf")
    with pytest.raises(UserError, match=r"has 300 tokens|id \d+ is"):
        convert_gguf(small, more, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Of 300 tokens, and 5 rows beyond them.
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({301: ("anything", 5)}, None),  # unused, by its type
        ({301: ("[PAD301]", 1)}, None),  # by its text, as files without types have it
        (
            {301: ("<|im_start|>", 3)},
            r"original has no token for id 301, which is '<\|im_start\|>' in .*x\.gguf\. Name",
        ),
        ({301: ("<|im_start|>", 4)}, "has no token for id 301"),
        ({299: (" two  blanks", 4)}, None),
        ({299: (" two  blanks", 1)}, "id 299 is '▁two▁▁blanks' in .*, but ' two blanks' in "),
    ],
)
def test_a_token_is_padding_or_the_tokenizers(
    model: Path, tmp_path: Path, tokens: dict[int, tuple[str, int]], message: str | None
) -> None:
    original = tmp_path / "original"
    shutil.copytree(model, original)
    content = json.loads((original / "tokenizer.json").read_text())
    text = next(text for text, token in content["model"]["vocab"].items() if token == 299)
    content["model"]["merges"] = content["model"]["merges"][:-1]
    del content["model"]["vocab"][text]
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": 299, "content": "▁two▁▁blanks", "special": False}
    )
    (original / "tokenizer.json").write_text(json.dumps(content))
    file = write_gguf(original, tmp_path / "x.gguf", tokens={299: ("▁two▁▁blanks", 4)} | tokens)
    if message is None:
        convert_gguf(file, original, tmp_path / "out")
    else:
        with pytest.raises(UserError, match=message):
            convert_gguf(file, original, tmp_path / "out")
        assert not (tmp_path / "out").exists()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
SCALED = {
    "llama3": ({}, ["rope_freqs.weight"]),
    "keys": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, []),
    "factors": ({}, ["rope_factors_long.weight", "rope_factors_short.weight"]),
}


def scaled(model: Path, directory: Path, **changes: object) -> Path:
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_parameters": LLAMA3} | changes))
    return directory


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_positions_are_those_of_the_original(model: Path, tmp_path: Path, kind: str) -> None:
    original, output = scaled(model, tmp_path / "original"), tmp_path / "out"
    keys, tensors = SCALED[kind]
    file = write_gguf(original, tmp_path / "x.gguf", keys=keys, tensors=tensors)
    convert_gguf(file, original, output)
    assert read_architecture(output).inverse_frequencies == read_architecture(original).inverse_frequencies
    assert read_architecture(output).inverse_frequencies != read_architecture(model).inverse_frequencies
    ids = torch.arange(4, 100)[None]
    logits = [AutoModelForCausalLM.from_pretrained(one)(ids).logits for one in (original, output)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_file_without_scaling_keeps_its_own_positions(model: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "x.gguf", keys={"llama.rope.scaling.type": "none"})
    convert_gguf(file, model, tmp_path / "out")
    assert (
        read_architecture(tmp_path / "out").inverse_frequencies
        == read_architecture(model).inverse_frequencies
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, r"has scaled rotary positions \(rope_freqs\.weight\).* has no config\.json\. Copy"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "has no rope_scaling\. Name"),
        ({"hidden_size": 64}, "hidden_size is 64 in .*config.json, but 32 in .*x.gguf\. Name"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, "num_attention_heads is 2"),
        ({"vocab_size": 304}, "vocab_size is 304"),
        ({"max_position_embeddings": 256}, "max_position_embeddings is 256"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}, "rope_theta is 500000.0"),
    ],
)
def test_scaling_of_another_model_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, object] | None, message: str
) -> None:
    file = write_gguf(model, tmp_path / "x.gguf", tensors=["rope_freqs.weight"])
    original = scaled(model, tmp_path / "original", **(changes or {}))
    if changes is None:
        (original / "config.json").unlink()
    with pytest.raises(UserError, match=message):
        convert_gguf(file, original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_has_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--from-gguf", str(tmp_path / "x.gguf"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
    assert end.value.code == 2 and "--from-gguf needs --tokenizer. " in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"{}"], ids=repr)
def test_a_damaged_file_is_refused(model: Path, tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.gguf.*: "):
        convert_gguf(tmp_path / "x.gguf", model, tmp_path / "out")
    with pytest.raises(UserError, match=r"x\.bin is not a \.gguf file"):
        convert_gguf(tmp_path / "x.bin", model, tmp_path / "out")


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-fuse\[gguf\]'"):
        convert_gguf(tmp_path / "x.gguf", model, tmp_path / "out")


@pytest.mark.parametrize("role", ["target", "source"])
@pytest.mark.parametrize("folder", ["models", "my models"])
@pytest.mark.parametrize("by_file", [True, False])
def test_a_gguf_file_as_a_model_is_refused_with_the_command_that_converts_it(
    model: Path, tmp_path: Path, role: str, folder: str, by_file: bool
) -> None:
    (tmp_path / folder).mkdir()
    file = tmp_path / folder / "x.gguf"
    file.write_bytes(b"GGUF")
    models = {"target": model, "source": model, role: file if by_file else file.parent}
    data = write_rows(tmp_path / "data.jsonl", [{"instruction": "a", "output": "b"}])
    recipe = small_recipe(tmp_path / "w", data, models["target"], {"a": models["source"]})
    with pytest.raises(UserError) as refusal:
        check_files(recipe)
    key = "target.model" if role == "target" else "sources.a.model"
    assert f"{key}: {file} is a GGUF file. Convert it once" in str(refusal.value)
    words = ["--from-gguf", str(file), "--tokenizer", "ORIGINAL_MODEL", "--output", str(file.with_suffix(""))]
    assert shlex.split(str(refusal.value).split("megatron-fuse convert ")[1]) == words
    file.unlink()
    with pytest.raises(UserError) as refusal:
        check_files(recipe)
    assert "convert" not in str(refusal.value)
