"""Device, process groups and seeds of one rank: set up once, then passed on as an argument."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_fuse.errors import UserError
from megatron_fuse.logs import choose_logging_rank
from megatron_fuse.runtime.cpu import enable_cpu_megatron
from megatron_fuse.runtime.libraries import importing_megatron
from megatron_fuse.runtime.megatron_versions import (
    complete_router,
    forget_auxiliary_losses,
    quiet_known_messages,
)
from megatron_fuse.runtime.optimizer import install_group_step_adamw

_TIMEOUT = timedelta(minutes=30)  # in which the other ranks must reach a collective


@dataclass(frozen=True)
class Runtime:
    """This rank's place in the layout. All sizes are counts of ranks."""

    rank: int
    world_size: int
    device: torch.device
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    expert_model_parallel_size: int
    data_parallel_size: int
    data_parallel_rank: int
    tensor_parallel_rank: int
    is_last_stage: bool  # this rank holds the last pipeline stage, where the loss is computed

    @property
    def is_logging_rank(self) -> bool:
        """True on exactly one rank: the first tensor and data rank of the last stage, which has the loss."""
        return self.is_last_stage and self.data_parallel_rank == self.tensor_parallel_rank == 0


def quiet_third_party_warnings() -> None:
    """Hides Megatron-core's warnings at import about every optional library that is absent. The banner says
    it once instead."""
    import warnings

    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex).*[Ff]alling back.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\..*")
    # Megatron causes these warnings too. Without a GPU Python reports them as raised in runtime/cpu.py.
    for message in ("Please use DTensor instead", "The .grad attribute of a Tensor that is not a leaf"):
        warnings.filterwarnings("ignore", message=message, module=r"megatron_fuse\.runtime\.cpu")
    quiet_known_messages()


def start_runtime(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    seed: int = 1234,
    deterministic: bool = False,
) -> Runtime:
    """Joins the processes that torchrun started, or runs alone, and builds Megatron's process groups.

    Reads RANK, WORLD_SIZE and LOCAL_RANK from the environment. deterministic: see
    _use_deterministic_algorithms. Raises UserError if the layout does not divide the number of processes, or
    if a machine has more processes than GPUs. It may be called again with another layout in the same
    processes: Megatron's old groups are destroyed first.
    """
    quiet_third_party_warnings()
    with importing_megatron():
        on_cpu = enable_cpu_megatron()
        install_group_step_adamw()
        complete_router()
        from megatron.core import parallel_state
    _use_deterministic_algorithms(deterministic)

    if virtual_pipeline_model_parallel_size == 1:  # Megatron would read 1 as an interleaved schedule
        virtual_pipeline_model_parallel_size = None
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    expert_size = expert_tensor_parallel_size or tensor_model_parallel_size
    _refuse_uneven_layout(world_size, tensor_model_parallel_size, pipeline_model_parallel_size)
    _refuse_uneven_experts(world_size, pipeline_model_parallel_size, expert_model_parallel_size, expert_size)
    device = torch.device("cpu") if on_cpu else _use_own_gpu()
    if not dist.is_initialized():
        _join_processes("gloo" if on_cpu else "nccl")
    _build_groups(
        seed,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_size,
    )
    runtime = Runtime(
        rank=rank,
        world_size=world_size,
        device=device,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )
    choose_logging_rank(runtime.is_logging_rank)
    return runtime


def _build_groups(seed: int, **sizes: int | None) -> None:
    """Builds Megatron's process groups, in the place of those of an earlier layout, and seeds this rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _refuse_uneven_layout(world_size: int, tensor: int, pipeline: int) -> None:
    size = tensor * pipeline
    if world_size % size:
        raise UserError(
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} needs a "
            f"multiple of {size} processes, but torchrun started {world_size}. Set --nproc-per-node (times "
            f"the number of nodes) to a multiple of {size}."
        )


def _refuse_uneven_experts(world_size: int, pipeline: int, experts: int, expert_tensor: int) -> None:
    size = expert_tensor * experts * pipeline
    if world_size % size:
        raise UserError(
            f"--expert-model-parallel-size {experts} x --expert-tensor-parallel-size {expert_tensor} "
            "(default: --tensor-model-parallel-size) x --pipeline-model-parallel-size "
            f"{pipeline} needs a multiple of {size} processes, but torchrun started {world_size}. Choose "
            f"smaller sizes, or set --nproc-per-node (times the number of nodes) to a multiple of {size}."
        )


def _use_own_gpu() -> torch.device:
    """Makes the GPU of this process, by LOCAL_RANK, the current one. Raises UserError if it has none."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started process {device.index + 1} on this machine, but only "
            f"{torch.cuda.device_count()} GPUs are visible. Set --nproc-per-node to "
            f"{torch.cuda.device_count()} at most."
        )
    torch.cuda.set_device(device)
    return device


def _join_processes(backend: str) -> None:
    """Builds the process group of all ranks; a group of one if torchrun did not start this process."""
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)


def _use_deterministic_algorithms(on: bool) -> None:
    """Makes torch, cuBLAS, Transformer Engine and NCCL use only algorithms whose result is the same each
    time, if `on`.

    It must be called before the process first uses its GPU.
    Variables that the user has set in the environment stay.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(on)
    # With deterministic algorithms torch by default also fills all new memory. That would cost a needless
    # pass over the logits.
    # torch.utils.deterministic sets this attribute where mypy does not see it.
    torch.utils.deterministic.fill_uninitialized_memory = not on  # type: ignore[attr-defined]


def banner(runtime: Runtime, what: Sequence[str] = ()) -> str:
    """A few lines about layout, device and job, with a clear notice if the machine has no GPU. what: the
    lines about the job."""
    lines = [
        f"processes: {runtime.world_size} = TP {runtime.tensor_model_parallel_size} x PP "
        f"{runtime.pipeline_model_parallel_size} x DP {runtime.data_parallel_size}"
        + (f" (EP {runtime.expert_model_parallel_size})" if runtime.expert_model_parallel_size > 1 else "")
        + (
            f" (virtual PP {runtime.virtual_pipeline_model_parallel_size})"
            if runtime.virtual_pipeline_model_parallel_size
            else ""
        ),
        f"device: {_device_name(runtime.device)}   backend: {dist.get_backend()}",
        *what,
    ]
    if runtime.device.type == "cpu":
        lines.append(
            "NO GPU: Megatron-core runs on gloo through megatron_fuse/runtime/cpu.py; correct, not fast"
        )
    width = max(map(len, lines))
    return "\n".join(["=" * width, *lines, "=" * width])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stop_runtime() -> None:
    """Destroys all process groups, if there are any."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    _release_groups()


def _release_groups() -> None:
    """Removes Megatron's last references to destroyed process groups.

    Each group of gloo has a thread that wakes up a hundred times a second for as long as the group exists.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    # destroy_model_parallel leaves these two out.
    for suffix in ("", "_GLOO"):
        setattr(parallel_state, f"_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP{suffix}", None)
    # A cache of the method keeps the last 32 modules, with their groups. A later version may have none.
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        if clear := getattr(embedding.forward, "cache_clear", None):
            clear()
    forget_auxiliary_losses()
