"""Access to kernels/benchmarks, a folder of scripts that import each other by file name."""

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.gpu_checks.rows import Row, failed, held, measured, not_run

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


def import_from_folder() -> None:
    """Makes the modules of the folder importable. Only for the process of a check."""
    sys.path.insert(0, str(FOLDER))


def require_repository() -> None:
    """Raises UserError if the folder is missing, as in an installed package."""
    if not FOLDER.is_dir():
        raise UserError(
            "the checks need kernels/benchmarks from the project's repository. Run them in a checkout."
        )


def meter_of(device: str) -> Any:
    """The clock of the benchmark for this device."""
    from timing import CpuMeter, CudaMeter

    return CudaMeter() if device == "cuda" else CpuMeter()


def copy_rate(device: str, meter: Any) -> float:
    """Bytes read and written per second by a copy that is larger than any cache.

    On a CPU the copy is small, to save time.
    """
    from measure import percentiles
    from timing import copy_times

    size = 1 << 30 if device == "cuda" else 1 << 24
    return 2 * size / (percentiles(copy_times(meter, device, size, repeats=9))[1] / 1e3)


def rows_of_cases(device: str, cases: Sequence[Any], left_out: Collection[str] = ()) -> Iterator[Row]:
    """Benchmark results for all providers but `left_out`: milliseconds, passes over the logits, and memory.

    One pass moves the bytes of the logits once. Its time is their number divided by the copy rate of the same
    run. After the results of a case come its targets, each with its limit.
    """
    from lineup import providers_of
    from measure import measure
    from report import verdicts

    meter = meter_of(device)
    rate = copy_rate(device, meter)
    yield measured("copy rate", rate / 1e9, "GB/s")
    for case in cases:
        chosen = [provider for provider in providers_of(case, device) if provider.name not in left_out]
        results = measure(case, chosen, meter, device, case.repeats)
        for result in results:
            name = f"{case}: {result.provider}"
            if not result.milliseconds:
                yield failed(name, result.note) if result.failed else not_run(name, result.note)
                continue
            milliseconds = result.milliseconds[case.modes[-1]][1]
            yield measured(name, milliseconds, "ms")
            if not case.h:
                yield measured(name, milliseconds / 1e3 * rate / case.logits_bytes, "passes")
            yield measured(name, result.peak_bytes[case.modes[-1]] / 1e6, "MB above the inputs")
        for verdict in verdicts(case, results, rate):
            what = f"{case}: {verdict.target}"
            yield (
                not_run(what, "not measured")
                if verdict.value is None
                else held(what, verdict.value, verdict.target.unit, f"<= {verdict.target.at_most:g}")
            )
