"""A bad step changes nothing and every rank knows of it; a spike is one in any unit; an allocator's error
says what to turn.
"""

import dataclasses
import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import SyntheticDataset, make_tiny_recipe, make_tiny_target
from test_layouts import Recorder, layout

BAD = {3, 4, 10}  # of the first phase, in a row, and of the second; no evaluation follows them


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


def make_tiny_trainer(workdir: Path, target: Path, sections: dict[str, Any]) -> Any:
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.target import read_target
    from megatron_fuse.training.target import build_target
    from megatron_fuse.training.trainer import make_trainer

    recipe = make_tiny_recipe(workdir, target, **sections)
    runtime = start_runtime(**recipe.parallel.sizes)
    model = read_target(recipe)
    return make_trainer(recipe, runtime, model.architecture, build_target(recipe, model), SyntheticDataset())


def state_hash(trainer: Any) -> str:
    """Of this rank's weights and all that its optimizer holds."""
    tensors = [weight for chunk in trainer.chunks for weight in chunk.parameters()]
    for part in trainer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors += [torch.tensor(group.get("step", 0)), *group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def poison(trainer: Any, bad: Iterable[int]) -> None:
    """In these steps, counted from 1, one rank's first layers give NaN: of one replica, one stage and one
    tensor rank.
    """
    steps = 0
    zero_grad = trainer.optimizer.zero_grad

    def counted() -> None:
        nonlocal steps
        steps += 1
        zero_grad()

    def spoil(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, None]) -> Any:
        return (output[0] * math.nan, output[1]) if module.training and steps in bad else None

    trainer.optimizer.zero_grad = counted
    if trainer.runtime.rank == 0:
        names = dict(trainer.chunks[0].named_modules())
        next(
            module for name, module in names.items() if name.endswith("mlp.linear_fc1")
        ).register_forward_hook(spoil)


def poisoned_run(workdir: Path, target: Path, sections: dict[str, Any]) -> list[tuple[int, float, str]]:
    """(iteration, gradient norm, state_hash) of this rank after every step."""
    from megatron_fuse.training.trainer import train

    trainer = make_tiny_trainer(workdir, target, sections)
    poison(trainer, BAD)
    seen = [(0, 0.0, state_hash(trainer))]

    class HashingRecorder(Recorder):
        def step(
            self, iteration: int, consumed: int, phase: str, lr: float, values: dict, *sizes: float
        ) -> None:
            seen.append((iteration, values["grad norm"], state_hash(trainer)))

    train(dataclasses.replace(trainer, log=HashingRecorder()))
    return seen


@pytest.mark.parametrize(
    ("world_size", "parallel", "training"),
    [
        pytest.param(2, layout(), {}, id="dp2-fp32"),
        pytest.param(2, layout(), {"clip_grad": 0}, id="dp2-unclipped", marks=pytest.mark.slow),
        pytest.param(2, layout(tp=2), {"precision": "bf16"}, id="tp2-bf16", marks=pytest.mark.slow),
        pytest.param(2, layout(pp=2), {"micro_batch_size": 4}, id="pp2-fp32"),
        pytest.param(
            4,
            layout(tp=2, use_distributed_optimizer=True, overlap_grad_reduce=True),
            {"precision": "bf16"},
            id="tp2-dp2-distributed-bf16",
        ),
        pytest.param(
            2, layout(use_distributed_optimizer=True), {}, id="dp2-distributed-fp32", marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_without_a_finite_gradient_changes_nothing_on_any_rank(  # type: ignore[no-untyped-def]
    ranks, target, tmp_path, world_size, parallel, training
) -> None:
    sections = {"parallel": parallel, "training": {"train_iters": 11, **training}}
    for seen in ranks(world_size, poisoned_run, tmp_path, target, sections):
        assert [iteration for iteration, _, _ in seen] == list(range(12))
        for (_, _, before), (iteration, norm, after) in itertools.pairwise(seen):
            assert math.isfinite(norm) == (iteration not in BAD), (iteration, norm)
            assert (before == after) == (iteration in BAD), iteration


def aborted_run(workdir: Path, target: Path, parallel: dict[str, Any]) -> tuple[str, list[str]]:
    """What the run ends with, and the ids of the examples of its fourth step."""
    from megatron_fuse.errors import UserError
    from megatron_fuse.training.trainer import train

    trainer = make_tiny_trainer(
        workdir, target, {"parallel": parallel, "training": {"max_skipped_iterations": 2}}
    )
    poison(trainer, BAD)
    examples = trainer.schedule.step(24).examples  # batches of 8
    ids = [trainer.dataset.example_ids[example] for example in trainer.dataset.train[examples]]
    try:
        train(dataclasses.replace(trainer, log=Recorder()))
    except UserError as error:
        return str(error), ids
    return "went on", ids


def test_so_many_skipped_steps_in_a_row_end_the_run_on_every_rank(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for message, ids in ranks(2, aborted_run, tmp_path, target, layout(tp=2)):
        assert message.startswith("iteration 4: ") and ", ".join(ids) in message
        assert "--max-skipped-iterations 2" in message


def test_a_loss_that_is_not_finite_has_such_a_gradient() -> None:
    """The label's logit at -inf: the loss is inf, softmax minus one-hot is not."""
    from megatron_fuse.training.batches import MicroBatch
    from megatron_fuse.training.loss import make_forward_step

    def gradient(added: float) -> tuple[float, float]:
        weight = torch.ones(1, 2, requires_grad=True)
        losses = torch.stack([weight + added, *[weight.detach()] * 5])
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        batch = MicroBatch(tokens, tokens, None, mode=torch.tensor([0]), source=torch.tensor([0]))
        step = make_forward_step(micro_batches=3, sources=1)
        output, loss_function = step(iter([batch]), lambda *_, **__: losses)  # type: ignore[arg-type, list-item]
        loss, _ = loss_function(output)
        loss.backward()
        return loss.item(), weight.grad[0, 0].item()  # type: ignore[index]

    loss, of_weight = gradient(0.0)
    assert loss == pytest.approx(2.0 * 3) and of_weight == pytest.approx(3)
    for added in (math.inf, math.nan):
        assert not any(map(math.isfinite, gradient(added)))


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4))
def test_only_skips_in_a_row_count(bad: list[bool], most: int) -> None:
    from megatron_fuse.errors import UserError
    from megatron_fuse.training.guards import StepGuard

    guard, stopped_at = StepGuard(most), None
    for iteration, is_bad in enumerate(bad, 1):
        try:
            warning = guard.watch(
                iteration, "a", {"grad norm": math.nan if is_bad else 1.0}, lambda: ["example-7"]
            )
        except UserError as error:
            assert "example-7" in str(error)
            stopped_at = iteration
            break
        assert (warning is not None) == is_bad
    runs = (at + most for at in range(len(bad) - most + 1) if all(bad[at : at + most]))
    assert stopped_at == next(runs, None)


losses = st.lists(st.floats(0.1, 10), min_size=16, max_size=64)


@settings(deadline=None)
@given(losses, st.floats(0.1, 1000), st.integers(-20, 20))
def test_a_spike_is_one_in_any_unit_and_order(last: list[float], loss: float, exponent: int) -> None:
    from megatron_fuse.training.guards import is_spike

    scaled = [math.ldexp(value, exponent) for value in last]  # exact
    assert (
        is_spike(loss, last) == is_spike(math.ldexp(loss, exponent), scaled) == is_spike(loss, sorted(last))
    )


@settings(deadline=None)
@given(losses, st.floats(1.01, 1e6))
def test_what_lies_inside_the_window_is_no_spike_and_what_lies_far_above_is(
    last: list[float], factor: float
) -> None:
    from megatron_fuse.training.guards import is_spike

    assert not is_spike(float(np.median(last)), last) and not is_spike(min(last), last)
    assert not is_spike(1e9, last[:15])
    spread = max(max(last) - min(last), 0.01 * max(last))
    assert is_spike(max(last) + 16 * factor * spread, last)


def test_one_outlier_neither_hides_nor_makes_a_spike() -> None:
    from megatron_fuse.training.guards import is_spike

    rng = np.random.default_rng(0)
    last = list(1 + 0.05 * rng.standard_normal(64))
    assert not any(is_spike(loss, last) for loss in 1 + 0.05 * rng.standard_normal(10_000))
    assert is_spike(2.0, last) and is_spike(2.0, [1e6, *last[1:]]) and not is_spike(1.1, [0.0, *last[1:]])


def test_a_spike_is_warned_of_with_its_examples_and_not_at_a_new_phase() -> None:
    from megatron_fuse.training.guards import StepGuard

    guard = StepGuard(3)

    def watch(iteration: int, phase: str, loss: float) -> str | None:
        return guard.watch(iteration, phase, {"grad norm": 1.0, "loss": loss}, lambda: ["example-7"])

    assert not any(watch(step, "first", 1 + 0.01 * (step % 5)) for step in range(1, 31))
    warning = watch(31, "first", 3.0)
    assert warning is not None and "iteration 31" in warning and "example-7" in warning
    assert watch(32, "second", 3.0) is None  # weighted otherwise


def differing_replicas(
    target: Path, workdir: Path, parallel: dict[str, Any], spoiled: tuple[int, ...]
) -> str | None:
    from megatron_fuse.errors import UserError
    from megatron_fuse.training.guards import check_weights_across_replicas

    trainer = make_tiny_trainer(workdir, target, {"parallel": parallel, "training": {"precision": "bf16"}})
    if trainer.runtime.rank in spoiled:
        with torch.no_grad():
            next(trainer.chunks[0].parameters()).view(-1)[-1] *= -1
    try:
        check_weights_across_replicas(trainer.chunks, 5)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("spoiled", [(), (3,), (0, 1)])
def test_every_rank_hears_of_replicas_that_differ(ranks, target, tmp_path, spoiled) -> None:  # type: ignore[no-untyped-def]
    messages = ranks(4, differing_replicas, target, tmp_path, layout(tp=2), spoiled)
    for message in messages:
        assert (message is not None) == bool(spoiled)
    if spoiled:
        assert any("word_embeddings.weight" in message for message in messages)


def test_a_difference_in_the_first_of_two_chunks_is_found(ranks, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Both chunks of a virtual pipeline call their layers by the same names."""
    target = make_tiny_target(tmp_path / "target", layers=4)
    messages = ranks(4, differing_replicas, target, tmp_path, layout(pp=2, vp=2), (3,))
    assert all(message is not None for message in messages)
    assert any("chunk 0: " in message for message in messages)


def out_of_memory(
    target: Path, workdir: Path, allocate: Callable[[], object], training: dict[str, Any]
) -> str:
    from megatron_fuse.errors import UserError
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.target import read_target
    from megatron_fuse.training.memory import advise_when_out_of_memory

    recipe = make_tiny_recipe(workdir, target, training=training)
    runtime = start_runtime()
    try:
        with advise_when_out_of_memory(recipe, read_target(recipe).architecture, runtime, SyntheticDataset()):
            allocate()
    except UserError as error:
        return str(error)
    except RuntimeError as error:
        return f"passed on: {error}"
    return "fitted"


def too_much() -> object:
    return torch.empty(1 << 50)


def as_on_a_gpu() -> object:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def as_cublas_says() -> object:
    raise RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`, which could not allocate"
    )


def as_nccl_says() -> object:
    raise torch.distributed.DistBackendError(
        "NCCL error: unhandled cuda error. Failed to allocate: Cuda failure 2 'out of memory'"
    )


def another_error() -> object:
    return torch.ones(2) @ torch.ones(3)


def test_an_allocators_error_says_what_to_turn(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for allocate in (too_much, as_on_a_gpu, as_cublas_says, as_nccl_says):
        (message,) = ranks(1, out_of_memory, target, tmp_path, allocate, {"micro_batch_size": 4})
        assert "out of memory" in message and "allocate" in message and "weights 0.20 MiB" in message
        knobs = ("--micro-batch-size 2 (now 4)", "--recompute", "--tensor-model-parallel-size 2 (now 1)")
        assert all(f"{knob} saves about" in message for knob in knobs)
        assert "--use-distributed-optimizer" not in message  # there is no other replica to share with
    (message,) = ranks(
        1, out_of_memory, target, tmp_path, too_much, {"micro_batch_size": 1, "recompute": True}
    )
    assert "--micro-batch-size" not in message and "--recompute" not in message
    (message,) = ranks(1, out_of_memory, target, tmp_path, another_error, {})
    assert message.startswith("passed on: ") and "size" in message


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_one_rank_that_dies_ends_the_job_and_is_the_one_named(
    target: Path, tmp_path: Path, dying: int
) -> None:
    """Its traceback comes first, and torchrun gives it as the cause, not those that lost their peer and
    may end sooner.
    """
    here = Path(__file__).parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [*torchrun, str(here / "dying_rank.py"), str(tmp_path), str(target), str(dying)]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert job.returncode != 0 and (tmp_path / "died_at").exists(), job.stderr
    first = job.stderr.index("ZeroDivisionError: this rank has a bug")
    assert "Connection closed by peer" not in job.stderr[:first]
    cause = job.stderr[job.stderr.index("Root Cause (first observed failure)") :]
    assert f"rank      : {dying} " in cause and "ZeroDivisionError: this rank has a bug" in cause
