"""A directory whose weights can be read in two ways is refused in every role of its model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from config_files import refusal
from safetensors.torch import load_file, save_file
from small_models import save_model

from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.huggingface.talk import load
from megatron_fuse.merging import _common_shapes
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.expected_weights import check_weights
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.recipe import RewardModelOptions, SourceOptions
from megatron_fuse.scoring.reward_models import load_reward_model


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
