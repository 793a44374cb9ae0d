"""A model that goes through a Megatron checkpoint comes back in the precision that it had, unless another
is asked for.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import make_tiny_target

from megatron_fuse.model.weight_files import DTYPES, common_dtype
from megatron_fuse.training.export import export_checkpoint


def imported(model_dir: Path, directory: Path) -> Path:
    """On a rank: a checkpoint of a model."""
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.target import import_hugging_face

    start_runtime()
    return import_hugging_face(model_dir, directory)


def in_dtype(origin: Path, directory: Path, dtype: str, *, stated: str | None, weights: bool = True) -> Path:
    """A copy of a model with its weights in a dtype, or without them, and that of its config as stated."""
    shutil.copytree(origin, directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    if not weights:
        (directory / "model.safetensors").unlink()
    config = json.loads((directory / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    config |= {"torch_dtype": stated} if stated else {}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_model_comes_back_in_its_own_dtype_bit_for_bit(ranks, tmp_path: Path, dtype: str) -> None:  # type: ignore[no-untyped-def]
    origin = make_tiny_target(tmp_path / "origin")
    model = in_dtype(origin, tmp_path / "model", dtype, stated="float32")  # what the weights are counts
    bare = in_dtype(origin, tmp_path / "bare", dtype, stated=str(DTYPES[dtype])[6:], weights=False)
    silent = in_dtype(origin, tmp_path / "silent", dtype, stated=None, weights=False)
    references = {model: None, bare: None, silent: None, origin: "bf16"}
    (checkpoint,) = ranks(1, imported, model, tmp_path / "checkpoints")
    written = [
        export_checkpoint(checkpoint, reference, tmp_path / f"out-{number}", asked)
        for number, (reference, asked) in enumerate(references.items())
    ]
    assert written == [dtype, dtype, "fp32", "bf16"]
    before = load_file(model / "model.safetensors")
    for number, name in enumerate(written):
        after = load_file(tmp_path / f"out-{number}" / "model.safetensors")
        assert after.keys() == before.keys() and {tensor.dtype for tensor in after.values()} == {DTYPES[name]}
        if number < 3:
            assert all(torch.equal(after[key].float(), before[key].float()) for key in before)


@pytest.mark.parametrize(
    ("given", "common"),
    [
        (["bf16"], "bf16"),
        (["fp16", "fp16"], "fp16"),
        (["bf16", "fp16"], "fp32"),
        (["fp32", "bf16"], "fp32"),
        (["fp32"], "fp32"),
    ],
)
def test_the_common_type_holds_every_value(given: list[str], common: str) -> None:
    assert common_dtype(given) == common
    for dtype in given:
        values = torch.tensor(
            [torch.finfo(DTYPES[dtype]).max, torch.finfo(DTYPES[dtype]).eps + 1], dtype=DTYPES[dtype]
        )
        assert torch.equal(values.to(DTYPES[common]).double(), values.double())
