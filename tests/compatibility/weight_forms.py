"""The forms in which a model directory has its weights, made of a small Llama."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


def _in_shards(
    directory: Path, weights: Weights, save: Callable, stem: str, ending: str
) -> list[dict[str, str]]:
    """Two files and their index; returns which tensor is in which."""
    names, half = sorted(weights), len(weights) // 2
    index = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"{stem}-{number:05d}-of-00002.{ending}"
        save({name: weights[name].contiguous() for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (directory / f"{stem}.{ending}.index.json").write_text(text)
    return [index]


def _safetensors(weights: Weights, path: Path) -> None:
    save_file(weights, path, metadata={"format": "pt"})


def _alone(directory: Path) -> Weights:
    """Takes the weights out of the directory."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    return weights


def one_file(directory: Path) -> None:
    """As it was saved."""


def shards(directory: Path) -> None:
    _in_shards(directory, _alone(directory), _safetensors, "model", "safetensors")


def one_bin(directory: Path) -> None:
    torch.save(_alone(directory), directory / "pytorch_model.bin")


def bin_shards(directory: Path) -> None:
    _in_shards(directory, _alone(directory), torch.save, "pytorch_model", "bin")


def file_beside_index(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    _in_shards(
        directory,
        {name: 1.5 * tensor for name, tensor in weights.items()},
        _safetensors,
        "model",
        "safetensors",
    )


def tensor_in_two_shards(directory: Path) -> None:
    shards(directory)
    first, second = sorted(directory.glob("model-*.safetensors"))
    _safetensors(load_file(second) | dict([next(iter(load_file(first).items()))]), second)


def shard_missing(directory: Path) -> None:
    shards(directory)
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def tensor_missing(directory: Path) -> None:
    weights = _alone(directory)
    del weights["model.norm.weight"]
    _safetensors(weights, directory / "model.safetensors")


def not_a_number(directory: Path) -> None:
    weights = _alone(directory)
    weights["model.norm.weight"][3] = torch.nan
    _safetensors(weights, directory / "model.safetensors")


def adapter_beside(directory: Path) -> None:
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def quantized(directory: Path) -> None:
    path = directory / "config.json"
    quantization = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


FORMS: dict[str, Callable[[Path], None]] = {
    "one safetensors file": one_file,
    "safetensors in shards": shards,
    "one pytorch_model.bin": one_bin,
    "pytorch_model.bin in shards": bin_shards,
    "a single file and an index with other weights": file_beside_index,
    "a tensor in a shard where the index does not have it": tensor_in_two_shards,
    "a shard is missing": shard_missing,
    "a tensor is missing": tensor_missing,
    "a weight is no number": not_a_number,
    "an adapter beside the weights": adapter_beside,
    "GPTQ in config.json": quantized,
}


def in_form(form: str, model: Path, directory: Path) -> Path:
    """A copy of a model in this form."""
    shutil.copytree(model, directory)
    FORMS[form](directory)
    return directory
