"""Damaged weight files, headers and indices are refused by file and tensor, and no code in them is run."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import refusal, write_config
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.storage.safetensors_header import read_safetensors_header


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
