"""GroupStepAdamW is torch's AdamW whose step count is part of the parameter group, where Megatron saves
it.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretend_device import pretend_device

from megatron_fuse.runtime import GroupStepAdamW, optimizer


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 5), (7,), (1,)]]


def take_steps(optimizer: torch.optim.Optimizer, chosen: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in chosen:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


OPTIONS = [{"lr": 0.1}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_steps_as_torch_does(options: dict) -> None:
    ours, theirs = parameters(1), parameters(1)
    take_steps(GroupStepAdamW(ours, **options), ours, range(5))
    take_steps(torch.optim.AdamW(theirs, **{"weight_decay": 0.0, **options}), theirs, range(5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS)
def test_moments_and_group_are_its_whole_state(options: dict) -> None:
    """What Megatron carries over a checkpoint: tensors of each parameter, and the group's own entries."""
    ours = parameters(1)
    first = GroupStepAdamW(ours, **options)
    take_steps(first, ours, range(3))
    resumed = copy.deepcopy(ours)
    second = GroupStepAdamW(resumed, **options)
    for old, new in zip(ours, resumed, strict=True):
        state = first.state[old]
        assert set(state) == {"exp_avg", "exp_avg_sq"}
        second.state[new] = {name: value.clone() for name, value in state.items()}
    second.param_groups[0]["step"] = first.param_groups[0]["step"]
    take_steps(first, ours, range(3, 6))
    take_steps(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(ours, resumed, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_fused_kernel_of_a_gpu_steps_alike(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, fused = parameters(1), parameters(1)
    take_steps(GroupStepAdamW(ours, **options), ours, range(5))
    monkeypatch.setattr(optimizer, "is_on_gpu", lambda _: True)
    take_steps(GroupStepAdamW(fused, **options), fused, range(5))
    for a, b in zip(ours, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_nothing_of_a_step_is_made_on_another_device(apart: Callable[..., Any]) -> None:
    """The kernel, and the count of steps that it reads: of a copy from the host it would wait for the GPU."""
    apart(step_on_a_pretended_device)


def step_on_a_pretended_device() -> None:
    with pretend_device() as device, pytest.MonkeyPatch.context() as monkeypatch:
        there = [parameter.detach().to(device).requires_grad_() for parameter in parameters(1)]
        seen = []

        def adamw(parameters, gradients, means, squares, _, steps, *, foreach, fused, **rest) -> None:  # type: ignore[no-untyped-def]
            seen.append({tensor.device for tensor in (*parameters, *gradients, *means, *squares, *steps)})
            assert fused and not foreach and len({id(step) for step in steps}) == len(parameters)
            assert [step.tolist() for step in steps] == [float(len(seen) - 1)] * len(parameters)

        monkeypatch.setattr(optimizer, "adamw", adamw)
        monkeypatch.setattr(optimizer, "is_on_gpu", lambda parameter: parameter.device == device)
        steps = GroupStepAdamW(there)
        for _ in range(2):
            for parameter in there:
                parameter.grad = torch.zeros_like(parameter)
            steps.step()
        assert seen == [{device}] * 2


def test_a_rank_without_parameters_counts_the_same_step() -> None:
    empty = torch.nn.Parameter(torch.zeros(2))
    optimizer = GroupStepAdamW([empty])
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2
