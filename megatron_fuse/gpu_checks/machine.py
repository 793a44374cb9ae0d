"""Describes the machine: versions, the device, and its rates of copies and of matrix products.

The other checks are judged by these two rates.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_fuse.gpu_checks.clock import seconds_in_turns
from megatron_fuse.gpu_checks.kernel_benchmarks import copy_rate, import_from_folder, meter_of
from megatron_fuse.gpu_checks.rows import Row, measured, measured_or_held, not_run
from megatron_fuse.training.throughput import peak_flops_of_this_gpu

_PACKAGES = (
    *("torch", "triton", "megatron-core", "transformers", "numpy"),
    *("transformer-engine", "apex", "liger-kernel"),
)


def run(device: str, directory: Path) -> Iterator[Row]:
    yield measured("python", platform.python_version())
    for package in _PACKAGES:
        try:
            yield measured(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield not_run(package, "not installed")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield measured("cuda", torch.version.cuda or "none")
        yield measured("device", f"{properties.name}, sm_{properties.major}{properties.minor}")
        yield measured("devices", torch.cuda.device_count())
        yield measured("memory", properties.total_memory / 2**30, "GiB")
    else:
        yield measured(
            "device", f"CPU ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
    import_from_folder()
    yield measured("copy rate, read + written", copy_rate(device, meter_of(device)) / 1e9, "GB/s")
    rate = matmul_rate(device)
    yield measured("matmul rate, bf16", rate / 1e12, "TFLOP/s")
    peak = peak_flops_of_this_gpu()
    if peak is None:
        yield not_run(
            "matmul rate over the data sheet's", "not in the table of megatron_fuse/training/throughput.py"
        )
    else:
        yield measured_or_held("matmul rate over the data sheet's", rate / peak, "", ">= 0.5", counts=True)


def matmul_rate(device: str) -> float:
    """Floating-point operations per second of a product of two square matrices in bf16."""
    size = 8192 if device == "cuda" else 256
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    (seconds,) = seconds_in_turns(device, 10, lambda: one @ other)
    return 2 * size**3 / seconds
