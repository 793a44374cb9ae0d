"""Our safetensors files are the library's, byte for byte, with the mode that the umask gives."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from megatron_fuse.errors import UserError
from megatron_fuse.storage import write_safetensors

DTYPES = [
    "uint64",
    "int64",
    "float64",
    "complex64",
    "float32",
    "uint32",
    "int32",
    "bfloat16",
    "float16",
    "uint16",
    "int16",
    "int8",
    "uint8",
    "bool",
]


def tensors_of(names: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3, 5, generator=generator) * 10
    return {
        f"é {name} {index}": (values + index).to(getattr(torch, name)) for name in names for index in (1, 0)
    }


@pytest.mark.parametrize("names", [DTYPES, ["float32"], ["uint8", "bfloat16"], []], ids=len)
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_torch_tensors_give_the_library_s_bytes(
    tmp_path: Path, names: list[str], metadata: dict | None
) -> None:
    tensors = tensors_of(names) | {
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(3.5),
    }
    write_safetensors(tmp_path / "file", tensors, metadata)
    assert (tmp_path / "file").read_bytes() == safetensors.torch.save(tensors, metadata)


def test_numpy_arrays_give_the_library_s_bytes_also_where_they_are_not_contiguous(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.random((4, 6), np.float32),
        "t": rng.integers(0, 9, (5, 3)).T,
        "e": np.zeros((0, 2), np.uint8),
    }
    write_safetensors(tmp_path / "file", arrays)
    expected = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    assert (tmp_path / "file").read_bytes() == expected
    write_safetensors(tmp_path / "torch", {"w": torch.from_numpy(arrays["a"]).t()})
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "torch")["w"], torch.from_numpy(arrays["a"]).t()
    )


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "file", {"a": np.zeros(3)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {"a": np.zeros(3)})
    with pytest.raises(ValueError, match=r"tensor b: torch\.float8_e4m3fn"):
        write_safetensors(tmp_path / "file", {"b": torch.zeros(2, dtype=torch.float8_e4m3fn)})
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(tmp_path / "file/inside", {"a": np.zeros(3)})
    assert safetensors.numpy.load_file(tmp_path / "file")["a"].tolist() == [0, 0, 0]
