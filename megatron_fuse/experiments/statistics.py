"""Statistics over a few seeds: means, their standard errors, and differences between variants."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom. Beyond, the point of the normal
# distribution is used.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """The mean of n values, with its standard error (None for a single value)."""

    value: float
    error: float | None
    n: int

    @property
    def confidence(self) -> float | None:
        """Half the width of the 95 % confidence interval, by Student's t."""
        if self.error is None:
            return None
        return self.error * (_T95[self.n - 2] if self.n - 1 <= len(_T95) else 1.96)

    @property
    def is_clear(self) -> bool:
        """Whether the mean is more than two standard errors away from 0. If not, it is called a tie."""
        return self.error is not None and abs(self.value) > 2 * self.error


def mean(values: list[float]) -> Mean | None:
    if not values:
        return None
    center = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(center, None, 1)
    variance = math.fsum((value - center) ** 2 for value in values) / (len(values) - 1)
    return Mean(center, math.sqrt(variance / len(values)), len(values))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Mean | None:
    """The mean of the differences values - baseline over the seeds that both have; None without such a seed.

    A common effect of a seed on both cancels. values, baseline: seed -> value.
    """
    return mean([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])
