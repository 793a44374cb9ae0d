"""The CPU runtime is inert beside a GPU, and a layout that does not fit the processes is refused."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import threads_of_gloo
from small_models import save_model

from megatron_fuse.errors import UserError
from megatron_fuse.runtime import cpu, distributed


def test_beside_a_gpu_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "current_stream")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu.enable_cpu_megatron.__wrapped__() is False
    assert all(getattr(torch.cuda, name) is function for name, function in before.items())


def kinds_of_factories() -> dict[str, str]:
    """Where tensors are made, after the functions of torch have been replaced."""
    assert cpu.enable_cpu_megatron()
    with torch.device("meta"):
        within = torch.nn.Linear(2, 3).weight, torch.empty(2), torch.zeros(2, device="cuda")
    made = torch.tensor([1.0], device="cuda:0"), torch.scalar_tensor(2.0, device=torch.device("cuda"))
    moved = (
        made[0].to("cuda"),
        made[0].to(device="cuda"),
        made[0].to(made[1]),
        made[0].new_zeros(2, device="cuda"),
    )
    with torch.device("cpu"):  # a mode, within which torch calls methods twice
        kind = made[0].type()

    def scripted(n: int):  # type: ignore[no-untyped-def]
        return torch.zeros([n])

    return {
        "within": " ".join(str(tensor.device) for tensor in within),
        "made": " ".join(str(tensor.device) for tensor in (*made, *moved)),
        "type": f"{kind} {made[0].type()} {made[0].type(torch.float64).dtype}",
        "script": str(torch.jit.script(scripted)(2)),
        "compile": str(torch.compile(scripted, backend="eager", fullgraph=True)(2)),
    }


def test_cuda_means_cpu_for_all_that_makes_tensors(apart: Callable[..., dict[str, str]]) -> None:
    """A context of another device counts as before, and so do scripted and compiled functions."""
    assert apart(kinds_of_factories) == {
        "within": "meta meta cpu",
        "made": "cpu cpu cpu cpu cpu cpu",
        "type": "torch.cuda.FloatTensor torch.cuda.FloatTensor torch.float64",
        "script": "tensor([0., 0.])",
        "compile": "tensor([0., 0.])",
    }


def threads_after_a_model(model_dir: Path) -> list[int]:
    """How many threads of gloo there are after each of two runtimes that ran a model.

    A runtime before them is not counted: an earlier test may have left threads, which end with it.
    """
    from megatron_fuse.model.architecture import read_architecture
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.gpt import build_model
    from megatron_fuse.runtime import start_runtime, stop_runtime

    counts = []
    for _ in range(3):
        start_runtime()
        architecture = read_architecture(model_dir)
        model = build_model(architecture, transformer_config(architecture), seq_length=8)
        model.rotary_pos_emb(8)
        assert threads_of_gloo() > 0
        del model
        stop_runtime()
        gc.collect()
        counts.append(threads_of_gloo())
    return counts[1:]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux names threads there")
def test_a_runtime_that_has_ended_leaves_no_thread(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert ranks(1, threads_after_a_model, save_model(tmp_path / "model", "llama")) == [[0, 0]]


def sizes_and_banner(sizes: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.runtime.distributed import banner

    runtime = start_runtime(**sizes)
    found = (
        runtime.tensor_model_parallel_size,
        runtime.pipeline_model_parallel_size,
        runtime.data_parallel_size,
    )
    return (*found, int(runtime.is_logging_rank)), banner(runtime)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1)])
def test_one_rank_reports_at_every_layout(ranks, tp: int, pp: int, dp: int) -> None:  # type: ignore[no-untyped-def]
    results = ranks(
        4, sizes_and_banner, {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    )
    assert {found[:3] for found, _ in results} == {(tp, pp, dp)}
    assert sum(found[3] for found, _ in results) == 1
    assert "NO GPU" in results[0][1] or torch.cuda.is_available()


def refusal(sizes: dict[str, Any]) -> str:
    from megatron_fuse.runtime import start_runtime

    try:
        start_runtime(**sizes)
    except UserError as error:
        return str(error)
    return "accepted"


def test_a_layout_that_needs_other_processes_is_refused(ranks) -> None:  # type: ignore[no-untyped-def]
    for message in ranks(3, refusal, {"tensor_model_parallel_size": 2}):
        assert "--tensor-model-parallel-size 2" in message and "torchrun started 3" in message


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_deterministic_algorithms_where_asked_for(ranks, deterministic: bool) -> None:  # type: ignore[no-untyped-def]
    assert ranks(1, found_of_determinism, {"deterministic": deterministic}) == [
        (deterministic, deterministic)
    ]


def found_of_determinism(options: dict[str, Any]) -> tuple[bool, bool]:
    """Of torch, and of cuBLAS and Transformer Engine, which read the environment."""
    import os

    from megatron_fuse.runtime import start_runtime

    names = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    with pytest.MonkeyPatch.context() as environment:
        for name in names:
            environment.delenv(name, raising=False)
        start_runtime(**options)
        found = all(os.environ.get(name) == value for name, value in names.items())
        by_torch = torch.are_deterministic_algorithms_enabled()
        start_runtime()
    return by_torch, found


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "enable_cpu_megatron", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="but only 1 GPUs are visible\. Set --nproc-per-node to 1 at most"):
        distributed.start_runtime()
