"""The differences of a table: every row against the baseline, paired by seed, and which of them are clear."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_fuse.experiments.experiment import Experiment, Map, Table, run_name
from megatron_fuse.reporting.statistics import (
    LEVEL,
    Mean,
    clear,
    mean,
    moderated,
    paired_difference,
    smallest_seen,
)

Values = Mapping[str, Mapping[str, Mapping[int, float]]]
"""run -> metric -> seed -> value"""


@dataclass(frozen=True)
class Comparison:
    """One metric of one table.

    means: of the runs that have the metric.
    differences: to the baseline of their scenario, of the runs that share a seed with it.
    clear: the runs whose difference Holm's procedure finds, in their family.
    expected: the runs of the first family, whose difference was the question before the runs were made.
    """

    means: dict[str, Mean]
    differences: dict[str, Mean]
    clear: set[str]
    expected: set[str]

    @property
    def smallest_seen(self) -> float | None:
        """The smallest true difference that each cell would have shown with a chance of 80 %; the larger
        family counts.
        """
        explored = self.differences.keys() - self.expected
        families = [[self.differences[run] for run in runs] for runs in (self.expected, explored)]
        return smallest_seen(max(families, key=len), _level(families))


def compare(
    values: Values, metric: str, baselines: Mapping[str, str], expected: Sequence[str] = ()
) -> Comparison:
    """Compares runs with their baselines.

    baselines: run -> the run it is compared with; the same run for a baseline itself. expected: runs of the
    first family. All other runs are the second one, so that many explorations do not hide what was expected.
    """
    of = {run: values.get(run, {}).get(metric, {}) for run in {*baselines, *baselines.values()}}
    means, differences = dict[str, Mean](), dict[str, Mean]()
    for run, of_run in of.items():
        if (found := mean(list(of_run.values()))) is not None:
            means[run] = found
    for run, baseline in baselines.items():
        if run != baseline and (difference := paired_difference(of[run], of[baseline])) is not None:
            differences[run] = difference
    differences = moderated(differences)
    first = set(expected) & differences.keys()
    families = [
        {run: differences[run].p_value for run in runs} for runs in (first, differences.keys() - first)
    ]
    level = _level(families)
    return Comparison(means, differences, clear(families[0], level) | clear(families[1], level), first)


def _level(families: Sequence[Collection]) -> float:
    """The level of one family: two families share the level of their table."""
    return LEVEL / max(1, sum(len(family) > 0 for family in families))


def baselines(table: Table | Map) -> dict[str, str]:
    """run -> the run that it is compared with, in the table's order."""
    names = dict.fromkeys(
        [table.baseline, *table.rows] if isinstance(table, Map) else [*table.rows, table.baseline]
    )
    return {
        run_name(scenario, name): run_name(scenario, table.baseline)
        for scenario in table.scenarios
        for name in names
    }


def _expected(table: Table | Map) -> list[str]:
    return [run_name(scenario, name) for scenario in table.scenarios for name in table.expected]


def comparison_of(table: Table | Map, metric: str, values: Values) -> Comparison:
    """All runs of a table or map in one metric."""
    return compare(values, metric, baselines(table), _expected(table))


def comparisons(experiment: Experiment, table: Table | Map, values: Values) -> dict[str, Comparison]:
    """metric -> comparison."""
    return {metric: comparison_of(table, metric, values) for metric in experiment.metrics}
