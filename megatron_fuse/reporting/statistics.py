"""Statistics over a few seeds: means, their standard errors, differences between variants, and which are
clear.

Two things go wrong in a table of many rows over few seeds. First, many comparisons: if each had an error rate
of 5 %, a table of ten rows without any effect would show one in 40 % of all cases. So a difference is clear
only if Holm's procedure over the whole table finds it. Second, few seeds: the standard deviation of five
numbers is itself known badly, and a small one by chance makes a large t. So the variances of a table's
differences are shrunk towards their common value, as far as they agree (the moderated t-statistic of Smyth
2004, known from limma). The interval of every difference uses the moderated error too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

LEVEL = 0.05  # the chance of a false finding that the rows of a table allow, for each metric
POWER = 0.8  # the chance with which a difference of `smallest_seen` is found


@dataclass(frozen=True)
class Mean:
    """The mean of n values, with its standard error (None for a single value).

    degrees: the degrees of freedom of the error.
    """

    value: float
    error: float | None
    n: int
    degrees: int

    @property
    def confidence(self) -> float | None:
        """Half the width of the 95 % confidence interval, by Student's t."""
        return None if self.error is None else self.error * t_quantile(0.975, self.degrees)

    @property
    def p_value(self) -> float:
        """The chance of a mean at least as far from 0, if the true mean is 0.

        Two-sided t-test; 1 for one value.
        """
        # Equal values do not show that there is no error, only that it is not known.
        if not self.error:
            return 1.0
        return 2 * t_tail(abs(self.value) / self.error, self.degrees)


def mean(values: Sequence[float]) -> Mean | None:
    if not values:
        return None
    center = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(center, None, 1, 0)
    variance = math.fsum((value - center) ** 2 for value in values) / (len(values) - 1)
    return Mean(center, math.sqrt(variance / len(values)), len(values), len(values) - 1)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Mean | None:
    """The mean of the differences values - baseline over the seeds that both have; None without such a seed.

    A seed decides the data, the problems and the order of both, so that what a seed does to both cancels.
    values,
    baseline: seed -> value.
    """
    return mean([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def moderated(differences: Mapping[str, Mean]) -> dict[str, Mean]:
    """The differences with moderated standard errors (Smyth 2004, sections 3 to 6.2).

    The variances are taken as draws around a common variance. The prior's variance and its degrees of freedom
    come from the mean and the spread of their logarithms. A variance far above the common one keeps its own
    value: a noisy row is not made to look certain by its neighbours. Without enough differences, or of
    different numbers of seeds, nothing changes.
    """
    known = {name: each for name, each in differences.items() if each.error is not None}
    degrees = {each.degrees for each in known.values()}
    if len(known) < 3 or len(degrees) != 1:
        return dict(differences)
    (d,) = degrees
    variances = {name: each.n * each.error**2 for name, each in known.items() if each.error is not None}
    # A variance of 0, as between equal models, has no logarithm.
    floor = 1e-3 * sorted(variances.values())[len(variances) // 2]
    if floor == 0:
        return dict(differences)
    logs = [math.log(max(value, floor)) - digamma(d / 2) + math.log(d / 2) for value in variances.values()]
    center = math.fsum(logs) / len(logs)
    spread = math.fsum((value - center) ** 2 for value in logs) / (len(logs) - 1) - trigamma(d / 2)
    # Variances that differ no more than chance explains have one common variance.
    d0 = 2 * trigamma_inverse(spread) if spread > 0 else math.inf
    prior = math.exp(center if math.isinf(d0) else center + digamma(d0 / 2) - math.log(d0 / 2))
    total = int(min(d + d0, len(known) * d))

    def shrunk(name: str, each: Mean) -> Mean:
        own = variances[name]
        if d * own > prior * chi_square_quantile(0.95, d):
            return each
        variance = prior if math.isinf(d0) else (d0 * prior + d * own) / (d0 + d)
        return replace(each, error=math.sqrt(variance / each.n), degrees=total)

    return {name: shrunk(name, each) if name in known else each for name, each in differences.items()}


def clear(p_values: Mapping[str, float], level: float = LEVEL) -> set[str]:
    """The names whose null hypotheses Holm's step-down procedure rejects (Holm 1979).

    The chance that any true null hypothesis is among them is at most `level`, whatever the dependence.
    """
    found = set[str]()
    for done, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > level / (len(p_values) - done):
            break
        found.add(name)
    return found


def smallest_seen(differences: Sequence[Mean], level: float = LEVEL) -> float | None:
    """The smallest true difference that a family of comparisons finds with a chance of 80 %. None without
    errors.

    The difference with the median standard error counts, and Holm's first step. The sum of two quantiles of
    Student's t is the usual approximation of the noncentral distribution.
    """
    known = sorted((each.error, each.degrees) for each in differences if each.error is not None)
    if not known:
        return None
    error, degrees = known[len(known) // 2]
    return error * (t_quantile(1 - level / (2 * len(known)), degrees) + t_quantile(POWER, degrees))


def t_tail(t: float, degrees: int) -> float:
    """P(T > t) for t >= 0, by the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3
    and 26.7.4).
    """
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2:
        term, total = cosine, 0.0
        for k in range(1, degrees - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, degrees - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = sine * total
    return max(0.0, (1 - inside) / 2)


@cache
def t_quantile(share: float, degrees: int) -> float:
    """The point of Student's t below which `share` (0.5 to 1) of its mass lies, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > 1 - share:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 1 - share else (low, middle)
    return high


def chi_square_quantile(share: float, degrees: int) -> float:
    """The point of chi-square below which `share` of its mass lies (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NormalDist().inv_cdf(share) * math.sqrt(spread)) ** 3


def digamma(x: float) -> float:
    """The derivative of log gamma at x > 0: the recurrence up to 6, then the asymptotic series."""
    below = 0.0
    while x < 6:
        below, x = below - 1 / x, x + 1
    inverse = 1 / x**2
    return below + math.log(x) - 0.5 / x - inverse * (1 / 12 - inverse * (1 / 120 - inverse / 252))


def trigamma(x: float) -> float:
    """The second derivative of log gamma at x > 0."""
    below = 0.0
    while x < 6:
        below, x = below + 1 / x**2, x + 1
    inverse = 1 / x**2
    return below + 1 / x + inverse / 2 + inverse / x * (1 / 6 - inverse * (1 / 30 - inverse / 42))


def trigamma_inverse(value: float) -> float:
    """The x > 0 with trigamma(x) = value > 0.

    The function falls, so bisection on a logarithmic scale finds it.
    """
    low, high = 1e-8, 1e8
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if trigamma(middle) > value else (low, middle)
    return low
