"""Data stages on a pretended GPU: no tensor of theirs is left on the CPU, and what they find is what a CPU
finds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pretend_device import MixedDevices, PretendTensor, pretend_device
from safetensors.numpy import load_file
from small_models import FAMILIES, save_model, small_recipe, write_rows

from megatron_fuse.capture import CAPTURES, capture
from megatron_fuse.huggingface import loading
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, generate_responses, response_shards
from megatron_fuse.scoring import reward_models
from megatron_fuse.scoring.scores import load_scores, score_responses
from megatron_fuse.stages import Context

ROWS = [
    {"instruction": f"Add {n} and 1{' please' * n}.", "output": f"That is {n + 1}. {'été 🙂 ' * n}"}
    for n in range(7)
]


def test_a_pretended_gpu_computes_and_refuses_as_one_does(apart: Callable[..., Any]) -> None:
    apart(compute_and_refuse)


def compute_and_refuse() -> None:
    numbers = torch.arange(6.0)
    with pretend_device() as device:
        there = numbers.to(device)
        assert there.device == device and isinstance(there + 1, PretendTensor)
        assert torch.equal((there.view(2, 3).sum(1) * torch.tensor(2.0)).cpu(), torch.tensor([6.0, 24.0]))
        there[1] = 9
        assert there.tolist() == [0, 9, 2, 3, 4, 5]
        there.view(2, 3).mul_(2)
        assert there.tolist() == [0, 18, 4, 6, 8, 10]
        for made in (
            there[torch.tensor([1, 2])],
            torch.tensor([1], device=device),
            torch.zeros(2, device=device),
        ):
            assert isinstance(made, PretendTensor)
        for of_both in (
            lambda: there + numbers,
            lambda: torch.cat([there, numbers]),
            lambda: numbers.add_(there),
        ):
            with pytest.raises(MixedDevices, match="of the device and of the CPU"):
                of_both()
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
        weight = torch.randn(3, 3, device=device, requires_grad=True)
        (weight @ weight).sum().backward()
        assert isinstance(weight.grad, PretendTensor)
    values = weight.values.detach().requires_grad_()
    (values @ values).sum().backward()
    assert torch.equal(weight.grad.values, values.grad)


def stages(recipe: Recipe) -> dict[str, np.ndarray]:
    """Runs what the sources and the reward model do, and returns all that they found."""
    prepare_instructions(Context(recipe))
    found = {}
    for source in recipe.sources:
        generate_responses(Context(recipe), source)
        score_responses(Context(recipe), "reward", [source])
        capture(Context(recipe), source, "training")
        answers = [
            answer for shard in response_shards(Context(recipe).open(RESPONSES, source)) for answer in shard
        ]
        found[f"{source} answers"] = np.array([repr(answer) for answer in answers])
        found[f"{source} scores"] = load_scores(Context(recipe), source, "reward")
        for path in sorted(
            Context(recipe).open(CAPTURES, source, "training").directory.glob("*.safetensors")
        ):
            found |= {f"{source} {path.name} {name}": array for name, array in load_file(path).items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_sources_and_reward_models_run_on_the_device_of_their_models(
    apart: Callable[..., Any], family: str, tmp_path: Path
) -> None:
    apart(run_on_both_devices, family, tmp_path)


def run_on_both_devices(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", family)
    save_model(tmp_path / "reward", family, reward=True)
    write_rows(tmp_path / "data.jsonl", ROWS)

    def recipe(workdir: str) -> Recipe:
        return small_recipe(
            tmp_path / workdir,
            tmp_path / "data.jsonl",
            tmp_path / "model",
            {"s": tmp_path / "model"},
            data={"shard_size": 4},
            reward_models={"reward": {"model": str(tmp_path / "reward"), "dtype": "fp32"}},
            responses={"max_new_tokens": 6},
        )

    expected = stages(recipe("cpu"))
    with (
        pretend_device() as device,
        patch.object(loading, "this_device", lambda: device),
        patch.object(reward_models.loading, "this_device", lambda: device),
    ):
        found = stages(recipe("gpu"))
    assert found.keys() == expected.keys() and len(expected) > 3
    for name, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)
