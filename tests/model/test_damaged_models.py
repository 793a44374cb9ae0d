"""Damaged or impossible model directories are refused by file and key, before memory is taken or code is
run.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import save_model

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint
from megatron_fuse.huggingface.limits import declared_vocab_size
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.huggingface.talk import load
from megatron_fuse.merging import _common_shapes
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.config_file import check_model_directory, load_config
from megatron_fuse.model.expected_weights import check_weights, refuse_non_finite
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.recipe import RewardModelOptions, SourceOptions
from megatron_fuse.scoring.reward_models import load_reward_model
from megatron_fuse.storage.safetensors_header import read_safetensors_header

Change = dict[str, Any] | str | bytes | Callable[[Path], None]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert len(str(caught.value)) <= 600
    return str(caught.value)


def write_config(directory: Path, change: Change) -> Path:
    """A key whose value is ... is left out."""
    path = directory / "config.json"
    if callable(change):
        change(path)
    elif isinstance(change, dict):
        path.write_text(
            json.dumps({key: value for key, value in (CONFIG | change).items() if value is not ...})
        )
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    return directory


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


def write_safetensors_text(
    path: Path, header: object, body: bytes = bytes(16), length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(start: Any, end: Any, shape: Any = (4,), dtype: Any = "F32", **further: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **further}


GOOD_HEADERS = [
    {"a": entry(0, 16)},
    {"__metadata__": {"format": "pt"}, "a": entry(0, 16)},
    {"__metadata__": None, "a": entry(0, 16, note=[1])},
    {"a": entry(8, 16, (2,)), "b": entry(0, 8, (2,))},  # not in the order of the bytes
    {"a": entry(0, 16), "empty": entry(16, 16, (0, 7))},
    {"scalar": entry(0, 4, ()), "a": entry(4, 16, (3,))},
    {"a": entry(0, 16, (32,), "F4")},
    {"a": entry(0, 16, (16,), "F8_E4M3")},
    {"a": entry(0, 16, (2,), "C64")},
    json.dumps({"a": entry(0, 16)}).encode() + b"    ",
]
BAD_HEADERS = [
    ([], "holds a JSON list"),
    ({"a": 5}, "tensor a: .* not 5"),
    ({"a": {"dtype": "F32", "shape": [4]}}, "tensor a: data_offsets: missing"),
    ({"a": entry(0, 16) | {"data_offsets": []}}, "tensor a: data_offsets: "),
    ({"a": entry(0, 16) | {"data_offsets": [0, 16, 16]}}, "tensor a: data_offsets: "),
    ({"a": entry(-1, 15)}, "tensor a: data_offsets.0: .* not -1"),
    ({"a": entry(0.0, 16)}, "tensor a: data_offsets.0: .* not 0.0"),
    ({"a": entry(0, 2**70)}, "tensor a: data_offsets.1: "),
    ({"a": entry(16, 0)}, "tensor a: shape"),
    ({"a": entry(4, 16, (3,))}, "tensor a: data_offsets begin at 4"),
    ({"a": entry(0, 4, (1,)), "b": entry(8, 16, (2,))}, "tensor b: data_offsets begin at 8"),
    ({"a": entry(0, 16), "b": entry(0, 16)}, "tensor b: data_offsets begin at 0"),
    ({"a": entry(0, 8, (2,))}, "belong to no tensor"),
    ({"a": entry(0, 32, (8,))}, "is cut off"),
    ({"a": entry(0, 16, dtype="F31")}, "tensor a: dtype is 'F31'"),
    ({"a": entry(0, 16, dtype=None)}, "tensor a: dtype: "),
    ({"a": entry(0, 16, (3,))}, r"tensor a: shape \[3\] of F32 needs 12 bytes"),
    ({"a": entry(0, 16, (4.0,))}, "tensor a: shape.0: .* not 4.0"),
    ({"a": entry(0, 16, (2**32, 2**32))}, "tensor a: shape"),
    ({"__metadata__": {"a": 5}, "a": entry(0, 16)}, "__metadata__ is"),
    ({}, "belong to no tensor"),
    (b'{"\xff": 1}', "is not UTF-8"),
    (b"[" * 100_000, "nested more than 64 deep"),
]


@pytest.mark.parametrize("header", GOOD_HEADERS, ids=str)
def test_headers_that_the_library_reads_are_read(tmp_path: Path, header: object) -> None:
    path = write_safetensors_text(tmp_path / "x.safetensors", header)
    tensors = read_safetensors_header(path).tensors
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, stored in tensors.items():
            if stored.dtype not in ("F4",):  # whose shape the library counts in bytes
                assert tuple(file.get_slice(name).get_shape()) == stored.shape


@pytest.mark.parametrize(("header", "said"), BAD_HEADERS, ids=lambda value: str(value)[:60])
def test_headers_that_the_library_refuses_are_refused_by_their_tensor(
    tmp_path: Path, header: object, said: str
) -> None:
    path = write_safetensors_text(tmp_path / "model.safetensors", header)
    with pytest.raises(Exception, match="deserializing header"):
        safe_open(path, "pt")
    write_config(tmp_path, {})
    for read in (lambda: WeightFiles(tmp_path).open_all(), lambda: model_fingerprint(tmp_path)):
        message = refusal(read)
        assert str(path) in message
        with pytest.raises(UserError, match=said):
            raise UserError(message)


def test_a_tensor_that_is_named_twice_is_refused(tmp_path: Path) -> None:  # the library drops the first
    text = json.dumps({"a": entry(0, 16)})[1:-1]
    path = write_safetensors_text(tmp_path / "x.safetensors", f"{{{text}, {text}}}".encode())
    assert "the key 'a' is given twice" in refusal(lambda: read_safetensors_header(path))


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1])
def test_a_header_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    path = write_safetensors_text(tmp_path / "x.safetensors", {"a": entry(0, 16)}, length=length)
    assert str(path) in refusal(lambda: read_safetensors_header(path))


def test_a_pointer_to_a_file_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in refusal(lambda: read_safetensors_header(path))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "weight_map: missing"),
        ({"weight_map": []}, "weight_map: "),
        ({"weight_map": {}}, "weight_map is empty"),
        ({"weight_map": {"a": 5}}, "weight_map.a: .* not 5"),
        ({"weight_map": {"a": ""}}, "weight_map.a is ''"),
        ({"weight_map": {"a": "/etc/passwd"}}, "weight_map.a is '/etc/passwd'"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, "weight_map.a is '../other"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "weight_map.a is"),
        ({"weight_map": {"a": "x" * 5000}}, "weight_map.a is"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors is missing; it must hold a"),
        ({"weight_map": {"a": "."}}, "weight_map.a is"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_weight_index_names_files_of_its_directory(tmp_path: Path, index: object, said: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(lambda: WeightFiles(tmp_path).open_all())
    assert str(tmp_path) in message
    with pytest.raises(UserError, match=said):
        raise UserError(message)


def test_a_tensor_that_the_index_lacks_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    assert "does not have the tensor b" in refusal(lambda: WeightFiles(tmp_path).shape("b"))


def split(directory: Path, factor: float = 1.0) -> dict[str, Path]:
    """Writes the weights, times factor, as an index with two shards beside the single file.

    Returns the files by a short name.
    """
    tensors = {name: tensor * factor for name, tensor in load_file(directory / "model.safetensors").items()}
    names = sorted(tensors)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {n: f for f, part in shards.items() for n in part}})
    )
    single, first, second = directory / "model.safetensors", *(directory / file for file in shards)
    return {"single": single, "index": index, "first": first, "second": second}


def two_sets(directory: Path) -> list[str]:
    files = split(directory, 1.5)
    return [str(files["single"]), files["index"].name, "Remove one of the two"]


def a_stale_index(directory: Path) -> list[str]:
    """As in a quantised or pruned copy that kept the index of its original."""
    files = split(directory)
    files["first"].unlink()
    files["second"].unlink()
    return [str(files["single"]), files["index"].name, "Remove one of the two"]


def a_stale_tensor(directory: Path) -> list[str]:
    """A shard holds, of an earlier state, what the index places in the other one."""
    files = split(directory)
    files["single"].unlink()
    tensors, others = load_file(files["second"]), load_file(files["first"])
    name = min(others)
    save_file(tensors | {name: others[name] * 1.5}, files["second"], metadata={"format": "pt"})
    return [f"{files['second']} holds {name}", f"places in {files['first'].name}", "Fetch the model again"]


def a_missing_shard(directory: Path) -> list[str]:
    files = split(directory)
    files["single"].unlink()
    files["second"].unlink()
    return [f"{files['second']} is missing", files["index"].name, "Fetch the model again"]


def read_as_target(directory: Path) -> None:
    check_weights(WeightFiles(directory), read_architecture(directory))


def read_as_source(directory: Path) -> None:
    load_causal_lm(SourceOptions(model=str(directory), dtype="fp32"), where="sources.s")


def read_as_reward_model(directory: Path) -> None:
    load_reward_model(RewardModelOptions(model=str(directory), dtype="fp32"), "reward")


def read_to_merge(directory: Path) -> None:
    _common_shapes([WeightFiles(directory)], None)


def read_to_chat(directory: Path) -> None:
    load(directory, None, False)


ROLES = {
    "target": read_as_target,
    "source": read_as_source,
    "reward": read_as_reward_model,
    "merge": read_to_merge,
    "chat": read_to_chat,
}


@pytest.mark.parametrize(
    "layout", [two_sets, a_stale_index, a_stale_tensor, a_missing_shard], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("role", ROLES)
def test_a_directory_that_can_be_read_in_two_ways_is_refused_in_every_role(
    tmp_path: Path, role: str, layout: Callable[[Path], list[str]]
) -> None:
    """transformers reads other tensors there than the index says: a source and a target would be two
    models.
    """
    directory = save_model(tmp_path / "model", "llama", reward=role == "reward")
    said = layout(directory)
    message = refusal(lambda: ROLES[role](directory))
    assert all(part in message for part in said), message


@pytest.mark.parametrize("role", ROLES)
def test_an_index_with_its_shards_alone_or_of_the_single_file_is_read_in_every_role(
    tmp_path: Path, role: str
) -> None:
    """Some programs write an index beside a single file, too."""
    directory = save_model(tmp_path / "model", "llama", reward=role == "reward")
    names = list(load_file(directory / "model.safetensors"))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    ROLES[role](directory)
    split(directory)["single"].unlink()
    ROLES[role](directory)


class _Call:
    """Unpickled, it would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda path: {"a": _Call(path)}, "reading it would run .*mkdir"),
        (lambda path: [torch.ones(2)], "its top level is a list"),
        (lambda path: {"a": 5}, "'a' is a int"),
        (lambda path: {5: torch.ones(2)}, "5 is a Tensor"),
        (lambda path: {"a": torch.ones(2).to_sparse()}, "'a' is sparse"),
        (lambda path: {"a": torch.ones(1).expand(10**12)}, "repeats what is stored"),  # 4 TB in memory
    ],
)
def test_a_bin_file_holds_tensors_alone(tmp_path: Path, content: Callable[[Path], object], said: str) -> None:
    torch.save(content(tmp_path / "made"), tmp_path / "pytorch_model.bin")
    message = refusal(lambda: WeightFiles(tmp_path).open_all())
    assert "pytorch_model.bin" in message and not (tmp_path / "made").exists()
    with pytest.raises(UserError, match=said):
        raise UserError(message)


def test_a_bin_file_that_is_cut_or_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for content in (
        whole[:100],
        whole[:-100],
        b"",
        b"\x80\x02.",
        pickle.dumps(_Call(tmp_path / "made")),
        whole[100:],
    ):
        path.write_bytes(content)
        assert str(path) in refusal(lambda: WeightFiles(tmp_path).open_all())
    assert not (tmp_path / "made").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "llama")


def set_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: set_config(path, hidden_size=10**6), "hidden_size 1000000"),
        (
            lambda path: set_config(path, num_hidden_layers=9999),
            "num_hidden_layers is 9999, but there are only 21 tensors",
        ),
        (lambda path: set_config(path, num_hidden_layers=3), "model.layers.2.*num_hidden_layers 3"),
        (lambda path: set_config(path, num_hidden_layers=1), "model.layers.1.*num_hidden_layers 1"),
        (lambda path: set_config(path, vocab_size=300), "embed_tokens.weight .*vocab_size 300"),
        (
            lambda path: edit_weights(path, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
            f"{DOWN} is I8",
        ),
        (lambda path: edit_weights(path, lambda t: t.update({DOWN: t[DOWN].double()})), f"{DOWN} is F64"),
    ],
)
def test_a_targets_weights_are_compared_before_a_model_is_made(
    model: Path, damage: Callable, said: str
) -> None:
    damage(model)
    with pytest.raises(UserError, match=said):
        check_weights(WeightFiles(model), read_architecture(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused(value: float, dtype: torch.dtype) -> None:
    weights = torch.ones(7, 5, dtype=dtype)
    refuse_non_finite(weights, "x")
    refuse_non_finite(weights[:0], "x")
    weights[6, 4] = value
    with pytest.raises(UserError, match="x holds NaN or infinite weights"):
        refuse_non_finite(weights, "x")


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda path: set_config(path, hidden_size=10**6),
            "describes a model of .* elements .*hidden_size 1000000",
        ),
        (
            lambda path: set_config(path, vocab_size=10**9),
            "describes a model of .* elements .*vocab_size 1000000000",
        ),
        (lambda path: set_config(path, num_hidden_layers=9999), "has 9999 layers .*holds only 21 tensors"),
        (
            lambda path: set_config(path, num_hidden_layers=1),
            "holds model.layers.1.*num_hidden_layers 1",
        ),  # was cut silently
        (
            lambda path: set_config(path, vocab_size=300),
            "has shape .305, 32., but config.json gives .300, 32.",
        ),
        (lambda path: set_config(path, hidden_act="no_such"), "hidden_act: KeyError: 'no_such'"),
        (lambda path: edit_weights(path, put_nan), f"{DOWN} holds NaN"),
        (lambda path: edit_weights(path, lambda t: t.pop(DOWN)), f"has no weights for {DOWN}"),
        (lambda path: os.truncate(path / "model.safetensors", 9000), "model.safetensors is cut off"),
    ],
)
def test_a_source_is_loaded_whole_or_refused(model: Path, damage: Callable, said: str) -> None:
    load_causal_lm(SourceOptions(model=str(model), dtype="fp32"), where="sources.s")
    damage(model)
    message = refusal(
        lambda: load_causal_lm(SourceOptions(model=str(model), dtype="fp32"), where="sources.s")
    )
    assert str(model) in message
    with pytest.raises(UserError, match=said):
        raise UserError(message)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda path: set_config(path, hidden_size=10**6),
            "describes a model of .* elements .*hidden_size 1000000",
        ),
        (lambda path: set_config(path, num_hidden_layers=9999), "has 9999 layers"),
        (lambda path: set_config(path, architectures={}), "architectures: "),
        (lambda path: set_config(path, rms_norm_eps=float("nan")), "rms_norm_eps: .* not nan"),
        (lambda path: edit_weights(path, put_nan), f"{DOWN} holds NaN"),
        (
            lambda path: edit_weights(path, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
            f"{DOWN} is I8",
        ),
        (
            lambda path: edit_weights(path, lambda t: t["score.weight"].fill_(float("inf"))),
            "score.weight holds NaN",
        ),
    ],
)
def test_a_reward_model_is_loaded_whole_or_refused(tmp_path: Path, damage: Callable, said: str) -> None:
    path = save_model(tmp_path / "reward", "llama", reward=True)
    damage(path)
    message = refusal(lambda: load_reward_model(RewardModelOptions(model=str(path), dtype="fp32"), "reward"))
    assert str(path) in message
    with pytest.raises(UserError, match=said):
        raise UserError(message)
