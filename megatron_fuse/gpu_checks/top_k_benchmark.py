"""Compares the kernel of capture with torch's topk and logsumexp."""

from collections.abc import Iterator
from pathlib import Path

from megatron_fuse.gpu_checks.kernel_benchmarks import import_from_folder, rows_of_cases
from megatron_fuse.gpu_checks.rows import Row


def run(device: str, directory: Path) -> Iterator[Row]:
    import_from_folder()
    from cases import headline_cases, quick_cases

    cases = headline_cases() if device == "cuda" else quick_cases()
    yield from rows_of_cases(device, [case for case in cases if case.kernel == "top_k"])
