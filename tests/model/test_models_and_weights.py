"""Weights that do not fit their config, or are no numbers, are refused before a model is made or used."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from config_files import refusal
from safetensors.torch import load_file, save_file
from small_models import save_model

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.expected_weights import check_weights, refuse_non_finite
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.recipe import RewardModelOptions, SourceOptions
from megatron_fuse.scoring.reward_models import load_reward_model


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
