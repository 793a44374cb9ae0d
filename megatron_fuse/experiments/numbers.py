"""The numbers of a comparison as text, in tables and quoted in prose.

A preface or a note of an experiment's file quotes a number as [[TABLE METRIC RUN]]. The report puts the cell
of that table there: the mean of a baseline, or the difference of another run. So prose cannot disagree with
the results.
"""

import re

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.comparison import Comparison, Values, baselines, comparison_of
from megatron_fuse.experiments.experiment import Experiment, Map, Table
from megatron_fuse.reporting.statistics import Mean

MARKS = ("▲", "▼")


def change(comparison: Comparison, run: str) -> str:
    """The difference with its interval and its mark; empty without one."""
    difference = comparison.differences.get(run)
    if difference is None:
        return ""
    width = f" ± {difference.confidence:.1f}" if difference.confidence is not None else ""
    return f"{difference.value:+.1f}{width}" + (
        MARKS[difference.value < 0] if run in comparison.clear else ""
    )


def with_error(found: Mean) -> str:
    return f"{found.value:.1f}" + (f" ± {found.error:.1f}" if found.error is not None else "")


_QUOTE = re.compile(r"\[\[(.*?)\]\]")
_NOT_MEASURED = "(not measured)"


def with_quotes(text: str, experiment: Experiment, values: Values) -> str:
    """The text with every [[TABLE METRIC RUN]] replaced by a number.

    Raises UserError if the experiment has no such table, metric or run.
    """
    return _QUOTE.sub(lambda found: _quoted(found[1], experiment, values), text)


def _quoted(words: str, experiment: Experiment, values: Values) -> str:
    tables: dict[str, Table | Map] = {**experiment.tables, **experiment.maps}
    match words.split():
        case name, metric, run if name in tables and metric in experiment.metrics:
            table = tables[name]
        case _:
            raise UserError(
                f"[[{words}]] quotes no number. Write [[TABLE METRIC RUN]] with a table or map of "
                f"{', '.join(tables)} and a metric of {', '.join(experiment.metrics)}."
            )
    runs = baselines(table)
    if run not in runs:
        raise UserError(f"[[{words}]] quotes no number: {name} has no run {run}. It has {', '.join(runs)}.")
    comparison = comparison_of(table, metric, values)
    if run not in comparison.means:
        return _NOT_MEASURED
    return change(comparison, run) or with_error(comparison.means[run])
