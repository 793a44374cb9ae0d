"""One case: every provider is checked, then timed side by side."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from cases import Case
from exactness import TOLERANCES, error_of
from inputs import make_inputs
from providers import Provider
from timing import Meter, call_peaks, call_times

OUT_OF_MEMORY = "out of memory"


@dataclass
class Result:
    """What one provider did with a case; both tables are empty where `note` says why."""

    provider: str
    note: str = ""
    failed: bool = False  # wrong or broken, as opposed to absent or too large for the memory
    milliseconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # mode -> p20, p50, p80
    peak_bytes: dict[str, int] = field(default_factory=dict)  # mode -> above the inputs


def measure(
    case: Case, providers: Sequence[Provider], meter: Meter, device: str, repeats: int
) -> list[Result]:
    """A wrong or broken provider is reported and not timed.

    The others take turns, so that all meet the same neighbours.
    """
    results = {provider.name: Result(provider.name, provider.absent) for provider in providers}
    if device == "cuda":
        torch.cuda.empty_cache()  # the last case's blocks have other sizes
    inputs = make_inputs(case, device)
    able = []
    for provider in (p for p in providers if not p.absent):
        result = results[provider.name]
        try:  # one library that cannot work here must not cost the others their figures
            error = error_of(provider, inputs)
            if not error <= TOLERANCES[case.dtype]:  # written so that NaN is wrong
                raise ArithmeticError(f"the relative error of the result is {error:.1e}, which is too large")
            result.peak_bytes = dict(zip(case.modes, call_peaks(meter, provider, inputs), strict=True))
            able.append(provider)
        except torch.OutOfMemoryError:
            result.note = OUT_OF_MEMORY
        except Exception as error:
            result.note, result.failed = (
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                True,
            )
    times = {provider.name: [] for provider in able}
    for _ in range(1 + repeats):
        for provider in able:
            times[provider.name].append(call_times(meter, provider, inputs))
    for name, calls in times.items():
        warm = zip(*calls[1:], strict=True)
        results[name].milliseconds = {
            mode: percentiles(values) for mode, values in zip(case.modes, warm, strict=True)
        }
    return list(results.values())


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80, of at least two."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
