"""Compares the loss kernels with other implementations, in passes over the logits."""

from collections.abc import Iterator
from pathlib import Path

from megatron_fuse.gpu_checks.kernel_benchmarks import import_from_folder, rows_of_cases
from megatron_fuse.gpu_checks.rows import Row

# Not measured: simple implementations that a user could write, and Liger's loss for dense teachers, which is
# another loss.
_LEFT_OUT = {"sparse autograd", "chunked top-k", "chunked checkpoint", "liger fused linear JSD"}
_COMPILED = {"dense torch.compile"}  # on a CPU the compiler takes longer than all other measurements together


def run(device: str, directory: Path) -> Iterator[Row]:
    import_from_folder()
    from cases import headline_cases, quick_cases

    cases = headline_cases() if device == "cuda" else quick_cases()
    of_loss = [case for case in cases if case.kernel != "top_k"]
    yield from rows_of_cases(device, of_loss, _LEFT_OUT if device == "cuda" else _LEFT_OUT | _COMPILED)
