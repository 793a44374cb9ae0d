"""Differences are taken question by question; what a table cannot show, its notes say."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation import BENCHMARKS, Metric, Result, compare, paired_difference
from megatron_fuse.evaluation.chart import draw_comparison
from megatron_fuse.evaluation.comparison import BETTER, TIE, WORSE, Comparison
from megatron_fuse.evaluation.page import comparison_markdown, comparison_table, comparison_text

ARC, GSM8K = BENCHMARKS["arc_challenge"], BENCHMARKS["gsm8k"]
outcome = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def result(
    model: str, benchmark=ARC, outcomes=(1.0, 0.0, 1.0), metric: str | None = None, **changes
) -> Result:
    value = None if None in outcomes else statistics.fmean(outcomes)
    metrics = {metric or benchmark.metric: Metric(value, 0.1, outcomes)}
    questions = [f"{benchmark.local}/{n} {n:016x}" for n in range(len(outcomes))]
    fields = {
        "made_from": {},
        "directory": "",
        "batch_size": 8,
        "seconds": 1.0,
        "positions": 128,
        "shortened": 0,
    }
    return Result(model, benchmark.name, **(fields | {"questions": questions} | changes), metrics=metrics)


def compared(*results: Result, benchmarks=(ARC,), **failures: str) -> Comparison:
    named = {(model, ARC.name): text for model, text in failures.items()}
    models = list(dict.fromkeys([*(r.model for r in results), *failures]))
    return compare({(r.model, r.task): r for r in results}, named, models, benchmarks, models[0])


@given(st.lists(st.tuples(outcome, outcome), min_size=2, max_size=60))
def test_a_paired_difference_is_the_mean_of_differences_with_its_error(
    pairs: list[tuple[float, float]],
) -> None:
    baseline, other = zip(*pairs, strict=True)
    found = paired_difference(baseline, other)
    differences = [after - before for before, after in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs))
    assert math.isclose(found.value, statistics.fmean(other) - statistics.fmean(baseline), abs_tol=1e-9)
    assert math.isclose(found.standard_error, error, rel_tol=1e-6, abs_tol=1e-9)
    assert found.verdict == (
        TIE if abs(found.value) <= 2 * found.standard_error else BETTER if found.value > 0 else WORSE
    )
    back = paired_difference(other, baseline)
    assert (back.value, back.standard_error) == (-found.value, found.standard_error)
    assert {found.verdict, back.verdict} in ({TIE}, {BETTER, WORSE})


@given(st.lists(outcome, min_size=2, max_size=20))
def test_a_model_ties_with_itself(outcomes: list[float]) -> None:
    found = paired_difference(outcomes, outcomes)
    assert (found.value, found.standard_error, found.verdict) == (0, 0, TIE)


@given(st.lists(st.tuples(outcome, outcome), min_size=2, max_size=20), st.data())
def test_questions_without_an_outcome_are_left_out_of_both(
    pairs: list[tuple[float, float]], data: st.DataObject
) -> None:
    holed = [*pairs, (None, 1.0), (0.5, None), (None, None)]
    order = data.draw(st.permutations(range(len(holed))))
    baseline, other = zip(*(holed[place] for place in order), strict=True)
    found, expected = paired_difference(baseline, other), paired_difference(*zip(*pairs, strict=True))
    assert found.questions == len(pairs)
    assert math.isclose(found.value, expected.value, abs_tol=1e-9)


def test_one_question_has_no_error_and_no_difference() -> None:
    assert paired_difference([0.0], [1.0]) is None
    (row,) = compared(result("a", outcomes=(1.0,)), result("b", outcomes=(0.0,))).rows
    assert row.differences == {"b": None}


def test_the_table_shows_values_errors_and_verdicts_beside_the_baseline() -> None:
    better, worse = (0.0, *[1.0] * 9), (0.0,) * 10
    comparison = compared(
        result("a", outcomes=worse), result("b", outcomes=better), result("c", outcomes=worse)
    )
    heading, (row,) = comparison_table(comparison)
    assert heading == ["", "questions", "a", "b", "b - a", "c", "c - a"]
    assert row == [
        ARC.heading,
        "10",
        "0.0 ± 10.0",
        "90.0 ± 10.0",
        "+90.0 ± 10.0 better",
        "0.0 ± 10.0",
        "+0.0 ± 0.0 tie",
    ]
    for text in (comparison_markdown(comparison), comparison_text(comparison)):
        assert all(cell in text for cell in row)
    panels = draw_comparison(comparison).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [ARC.heading]
    drawn = {round(float(line.get_xdata()[0]), 6) for line in panels[0].lines if len(line.get_xdata()) == 1}
    assert {0.0, 90.0} <= drawn


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (
            result("b", metric="acc,none"),
            "b on ARC-Challenge: the result has no acc_norm,none, only acc,none",
        ),
        (
            result("b", outcomes=(1.0, None, 0.0)),
            "b on ARC-Challenge: acc_norm,none is not a number on 1 of 3 questions",
        ),
        (None, "b on ARC-Challenge: no memory left"),
    ],
)
def test_a_number_that_is_missing_is_a_blank_with_a_note(other: Result | None, note: str) -> None:
    comparison = compared(result("a"), other) if other else compared(result("a"), b="no memory left")
    _, (row,) = comparison_table(comparison)
    assert row[2].startswith("66.7")
    assert row[3] == "-"
    assert comparison.notes == [note]
    assert note in comparison_markdown(comparison)
    draw_comparison(comparison)


def test_what_nobody_has_measured_and_shortened_prompts_are_noted() -> None:
    comparison = compared(result("a", shortened=2), benchmarks=(ARC, GSM8K))
    assert comparison.notes == [
        "a on ARC-Challenge: 2 of 3 prompts were longer than the model's 128 positions and lost their "
        "beginning",
        "a on GSM8K: not measured",
    ]


def test_a_note_of_several_models_and_benchmarks_stands_once() -> None:
    comparison = compared(result("a", shortened=2), result("b", shortened=2), benchmarks=(ARC, GSM8K))
    assert comparison.notes == [
        "a, b on ARC-Challenge: 2 of 3 prompts were longer than the model's 128 positions and lost their "
        "beginning",
        "a, b on GSM8K: not measured",
    ]


def test_models_that_were_asked_different_questions_are_not_compared() -> None:
    with pytest.raises(
        UserError, match=r"arc_challenge: a answered 3 questions, and b answered 3 other questions"
    ):
        compared(result("a"), result("b", questions=["x", "y", "z"]))
