"""Compares models on benchmarks: values with standard errors, and paired differences to a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.benchmarks import Benchmark
from megatron_fuse.evaluation.results import Result
from megatron_fuse.reporting.statistics import mean

BETTER, WORSE, TIE = "better", "worse", "tie"


@dataclass(frozen=True)
class Value:
    """value, standard_error: in [0, 1]. If there is no value, it is None and `note` says why."""

    value: float | None
    standard_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """Mean difference over the `questions` for which both models have an outcome.

    verdict: better or worse if the difference is more than two standard errors, else tie.
    """

    value: float
    standard_error: float
    questions: int
    verdict: str


@dataclass(frozen=True)
class Row:
    benchmark: Benchmark
    questions: int
    values: Mapping[str, Value]  # by model
    # By model, without the baseline; None if one of the two has no value.
    differences: Mapping[str, Difference | None]


@dataclass(frozen=True)
class Comparison:
    models: Sequence[str]
    baseline: str
    rows: Sequence[Row]
    notes: Sequence[str]  # facts that the table cannot show


def compare(
    results: Mapping[tuple[str, str], Result],
    failures: Mapping[tuple[str, str], str],
    models: Sequence[str],
    benchmarks: Sequence[Benchmark],
    baseline: str,
) -> Comparison:
    """The comparison of these models on these benchmarks. baseline: one of the models.

    results, failures: by (model, task). If a pair is in neither, it has no value. Raises UserError if two
    models were asked different questions of a benchmark.
    """
    rows, notes = [], list[tuple[str, str, str]]()
    for benchmark in benchmarks:
        of_model = {model: results.get((model, benchmark.name)) for model in models}
        values = {
            model: _value(of_model[model], benchmark, failures.get((model, benchmark.name), "not measured"))
            for model in models
        }
        differences = {
            model: _difference(of_model[baseline], of_model[model], benchmark)
            for model in models
            if model != baseline
        }
        counts = [len(result.questions) for result in of_model.values() if result]
        rows.append(Row(benchmark, max(counts, default=0), values, differences))
        for model in models:
            notes += [(text, benchmark.title, model) for text in _notes(values[model], of_model[model])]
    return Comparison(models, baseline, rows, _grouped(notes))


def paired_difference(baseline: Sequence[float | None], other: Sequence[float | None]) -> Difference | None:
    """Mean of other - baseline and its standard error, over the questions with both outcomes; None below two.

    The error is that of a mean of differences, sd / sqrt(n), with n - 1 in the variance. It is smaller than
    the standard errors of the two models suggest if both fail on the same questions. Raises ValueError if the
    lengths differ.
    """
    pairs = zip(baseline, other, strict=True)
    both = [after - before for before, after in pairs if before is not None and after is not None]
    if len(both) < 2:
        return None
    difference = mean(both)
    assert difference is not None and difference.error is not None
    verdict = (
        TIE if abs(difference.value) <= 2 * difference.error else BETTER if difference.value > 0 else WORSE
    )
    return Difference(difference.value, difference.error, difference.n, verdict)


def _value(result: Result | None, benchmark: Benchmark, failure: str) -> Value:
    if result is None:
        return Value(None, note=failure)
    metric = result.metrics.get(benchmark.metric)
    if metric is None:
        return Value(
            None, note=f"the result has no {benchmark.metric}, only {', '.join(result.metrics) or 'nothing'}"
        )
    if metric.value is None:
        lost = sum(outcome is None for outcome in metric.outcomes)
        return Value(
            None, note=f"{benchmark.metric} is not a number on {lost} of {len(metric.outcomes)} questions"
        )
    return Value(metric.value, metric.standard_error)


def _difference(baseline: Result | None, other: Result | None, benchmark: Benchmark) -> Difference | None:
    if not (
        baseline and other and benchmark.metric in baseline.metrics and benchmark.metric in other.metrics
    ):
        return None
    if baseline.questions != other.questions:
        raise UserError(
            f"{benchmark.name}: {baseline.model} answered {len(baseline.questions)} questions, and "
            f"{other.model} answered {len(other.questions)} other questions. Evaluate one of them again on "
            "the data of the other."
        )
    return paired_difference(
        baseline.metrics[benchmark.metric].outcomes, other.metrics[benchmark.metric].outcomes
    )


def _grouped(notes: Sequence[tuple[str, str, str]]) -> list[str]:
    """Notes (text, benchmark, model) as lines.

    A text that applies to several models and benchmarks appears once.
    """
    models: dict[tuple[str, str], list[str]] = {}
    for text, title, model in notes:
        models.setdefault((text, title), []).append(model)
    titles: dict[tuple[str, str], list[str]] = {}
    for (text, title), names in models.items():
        titles.setdefault((text, ", ".join(names)), []).append(title)
    return [f"{names} on {'; '.join(of_text)}: {text}" for (text, names), of_text in titles.items()]


def _notes(value: Value, result: Result | None) -> list[str]:
    notes = [value.note] if value.note else []
    if result and result.shortened:
        notes.append(
            f"{result.shortened} of {len(result.questions)} prompts were longer than the model's "
            f"{result.positions} positions and lost their beginning"
        )
    return notes
