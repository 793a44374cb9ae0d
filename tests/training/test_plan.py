"""The step plan is what the steps add up to, and FLOPs are those counted by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SyntheticDataset, make_tiny_target

from megatron_fuse.model.architecture import Architecture, read_architecture
from megatron_fuse.recipe.presets import PRESETS
from megatron_fuse.training.schedule import Schedule
from megatron_fuse.training.throughput import multiplying_parameters, peak_flops, training_flops


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(make_tiny_target(tmp_path_factory.mktemp("target"), layers=4))


def test_flops_are_those_counted_by_hand(architecture: Architecture) -> None:
    """Hidden 32, 4 heads of 8 and 2 key/value groups, MLP 64, 4 layers, 503 tokens."""
    of_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert multiplying_parameters(architecture) == 4 * of_layer + 32 * 503 == 52960
    # One position sees itself: 4 products of 32 channels in each of 4 layers forward make 2 * 2 * 32 * 4
    # FLOPs, backward twice.
    assert training_flops(architecture, np.array([1])) == 6 * 52960 + 3 * (2 * 2 * 32 * 4)
    # Three positions see 1 + 2 + 3.
    assert training_flops(architecture, np.array([3])) == 3 * 6 * 52960 + 6 * 3 * (2 * 2 * 32 * 4)


def test_the_flops_of_llama_2_7b_are_the_known_ones() -> None:
    """6.74 billion parameters, of which 0.13 billion are looked up, and 0.27 million are norms."""
    llama = SimpleNamespace(
        num_layers=32,
        hidden_size=4096,
        ffn_width=11008,
        experts=None,
        num_attention_heads=32,
        num_query_groups=32,
        head_dim=128,
        vocab_size=32000,
    )
    assert multiplying_parameters(llama) == 6_738_415_616 - 32000 * 4096 - 65 * 4096  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 2048), max_size=20), st.lists(st.integers(0, 2048), max_size=20))
def test_flops_add_up_over_documents_and_grow_when_two_become_one(
    first: list[int], second: list[int]
) -> None:
    shape = {"num_layers": 2, "hidden_size": 8, "ffn_width": 16, "num_attention_heads": 2, "experts": None}
    a: Any = SimpleNamespace(**shape, num_query_groups=1, head_dim=4, vocab_size=100)
    one, two = training_flops(a, np.array(first)), training_flops(a, np.array(second))
    assert training_flops(a, np.array(first + second)) == one + two
    assert training_flops(a, np.array([sum(first + second)])) >= one + two


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peak_flops_by_name(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "batch", [1, 8, 53, 60]
)  # 53 examples: one each, some left over, all at once, more than there are
def test_the_plan_is_what_the_steps_add_up_to(architecture: Architecture, preset: str, batch: int) -> None:
    from megatron_fuse.training.batches import phase_weights, plan_batch
    from megatron_fuse.training.plan import plan_phases, tokens_left

    dataset: Any = SyntheticDataset()
    schedule = Schedule(tuple(PRESETS[preset]), len(dataset.train), batch, seed=1)
    plans = plan_phases(schedule, dataset, architecture)
    tokens, supervised, ends, samples = (
        [0] * len(plans),
        [dict.fromkeys(p.supervised_tokens, 0) for p in plans],
        [],
        0,
    )
    while step := schedule.step(samples):
        of_step = plan_batch(
            dataset,
            dataset.train[step.examples],
            phase_weights(step.phase, progress=step.progress, kl_factor=1),
            micro_batch_size=2,
            data_parallel_size=1,
        )
        tokens[step.phase_index] += of_step.tokens
        for mode, labels in of_step.supervised_tokens.items():
            supervised[step.phase_index][mode] += labels
        samples = step.consumed_samples
        ends += [step.iteration + 1] if step.ends_phase else []
    assert [plan.last_iteration for plan in plans] == ends
    assert [plan.first_iteration for plan in plans] == [0, *ends[:-1]]
    assert [plan.tokens for plan in plans] == tokens
    assert [plan.supervised_tokens for plan in plans] == supervised
    assert sum(plan.samples for plan in plans) == samples
    assert tokens_left(plans, 0) == (tokens[0], sum(tokens))
    assert tokens_left(plans, ends[-1]) == (0, 0)
    for plan, end in zip(plans[1:], ends, strict=False):
        assert tokens_left(plans, end)[0] == plan.tokens
    left = [tokens_left(plans, iteration)[1] for iteration in range(ends[-1] + 1)]
    assert left == sorted(left, reverse=True)
