"""The environment of one process: device, process groups and seeds, and Megatron-core without CUDA."""

from megatron_fuse.runtime.cpu import enable_cpu_megatron
from megatron_fuse.runtime.distributed import Runtime, start_runtime, stop_runtime
from megatron_fuse.runtime.libraries import fused_adam_library
from megatron_fuse.runtime.optimizer import GroupStepAdamW, install_group_step_adamw

__all__ = [
    "GroupStepAdamW",
    "Runtime",
    "enable_cpu_megatron",
    "fused_adam_library",
    "install_group_step_adamw",
    "start_runtime",
    "stop_runtime",
]
