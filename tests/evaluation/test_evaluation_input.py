"""Bad input is named, with the place and the fix, before a model is loaded."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import write_rows
from small_questions import ROWS, question_files, write_questions

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation import BENCHMARKS, EvaluatedModel, benchmarks_named, evaluate, models_named

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron-fuse[eval]'")

QUICK = [BENCHMARKS["winogrande"], BENCHMARKS["truthfulqa_mc2"]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["alpha"], "'alpha' is not of the form NAME=DIR"),
        (["a/b=x"], "'a/b=x' is not of the form NAME=DIR"),
        (["a=nowhere"], "a: nowhere has no config.json"),
    ],
)
def test_models_are_named(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models_named(texts)


def test_a_name_stands_for_one_model(small_models: list[EvaluatedModel]) -> None:
    text = f"a={small_models[0].directory}"
    assert models_named([text]) == [EvaluatedModel("a", small_models[0].directory)]
    with pytest.raises(UserError, match=r"the name 'a' is given twice"):
        models_named([text, text])


def test_an_unknown_task_and_baseline_are_told_the_known(
    small_models: list[EvaluatedModel], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError,
        match=r"'arc' is not a known task. Choose from arc_challenge, .*gsm8k and the group openllm \(all of",
    ):
        benchmarks_named(["arc"])
    assert benchmarks_named(["gsm8k", "openllm"])[0] is BENCHMARKS["gsm8k"]
    assert len(benchmarks_named(["gsm8k", "openllm"])) == len(BENCHMARKS)
    with pytest.raises(
        UserError, match=r"--baseline 'gamma' is not one of the models\. Choose one of alpha, beta"
    ):
        evaluate(small_models, QUICK, tmp_path, baseline="gamma")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--max-new-tokens", "-1"], "--max-new-tokens must be at least 1"),
        (["--batch-size", "many"], "--batch-size must be auto or a number of at least 1"),
    ],
)
def test_options_are_checked(options: list[str], message: str, run_tool: Callable[..., int], capsys) -> None:
    assert run_tool("a=b", "--tasks", "openllm", "--output", "o", *options) == 2
    assert message in capsys.readouterr().err


def test_without_the_harness_its_extra_is_named(
    small_models: list[EvaluatedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm-eval cannot be imported .*pip install 'megatron-fuse\[eval\]'"):
        evaluate(small_models, QUICK, tmp_path)


def without(key: str):
    return lambda row: {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    ("task", "file", "change", "message"),
    [
        (
            "winogrande",
            "winogrande.jsonl",
            without("gold"),
            r":2: gold: missing. A row of winogrande needs the keys context_options",
        ),
        (
            "winogrande",
            "winogrande.jsonl",
            lambda row: row | {"gold": 2},
            r":2: gold: must be the index of one of the 2 context_options, not 2",
        ),
        (
            "hellaswag",
            "hellaswag.jsonl",
            lambda row: row | {"label": "1"},
            r":2: label: must be a valid integer, not '1'",
        ),
        (
            "mmlu",
            "mmlu_test.jsonl",
            lambda row: row | {"answer": "E"},
            r":2: answer.*must be 'A', 'B', 'C' or 'D', not 'E'",
        ),
        (
            "mmlu",
            "mmlu_test.jsonl",
            lambda row: row | {"subject": "tea"},
            r"dev_5shot.jsonl: has 0 examples of the subject 'tea'",
        ),
        (
            "truthfulqa_mc2",
            "truthfulqa_mc.jsonl",
            lambda row: row | {"mc2_targets": {"choices": ["a"], "labels": [0]}},
            r":2: mc2_targets.labels: must have a label for every choice",
        ),
        (
            "gsm8k",
            "gsm8k_test.jsonl",
            without("answer"),
            r":2: answer: missing. A row of gsm8k needs the keys question, answer",
        ),
        (
            "arc_challenge",
            "arc_challenge.jsonl",
            lambda row: row | {"choices": None},
            r":2: choices: must be a valid list",
        ),
        ("arc_challenge", "arc_challenge.jsonl", lambda row: row | {"choices": []}, r":2: choices: "),
        ("arc_challenge", "arc_challenge.jsonl", lambda row: row | {"choices": ["a", 5]}, r":2: choices.1: "),
        ("arc_challenge", "arc_challenge.jsonl", lambda row: row | {"gold": True}, r":2: gold: .*, not True"),
        (
            "arc_challenge",
            "arc_challenge.jsonl",
            lambda row: row | {"gold": -1},
            r":2: gold: must be the index",
        ),
        (
            "hellaswag",
            "hellaswag.jsonl",
            lambda row: row | {"endings": "abcd"},
            r":2: endings: must be a valid list",
        ),
        (
            "mmlu",
            "mmlu_test.jsonl",
            lambda row: row | {"subject": ["x"]},
            r":2: subject: must be a valid string",
        ),
        ("mmlu", "mmlu_test.jsonl", lambda row: row | {"answer": 4}, r":2: answer"),
        ("mmlu", "mmlu_test.jsonl", lambda row: row | {"choices": ["a"] * 5}, r":2: choices: "),
        (
            "truthfulqa_mc2",
            "truthfulqa_mc.jsonl",
            lambda row: row | {"mc2_targets": 5},
            r":2: mc2_targets: .*not 5",
        ),
        (
            "truthfulqa_mc2",
            "truthfulqa_mc.jsonl",
            lambda row: row | {"mc2_targets": {"choices": ["a"], "labels": [True]}},
            r":2: mc2_targets.labels.0: .*not True",
        ),
        (
            "gsm8k",
            "gsm8k_test.jsonl",
            lambda row: row | {"question": "\ud800"},
            r":2: question: .*surrogate pair",
        ),
        (
            "gsm8k",
            "gsm8k_test.jsonl",
            lambda row: row | {"answer": ["x" * 9999]},
            r":2: answer: must be a valid string",
        ),
    ],
)
def test_a_bad_row_is_named_before_anything_runs(
    small_models: list[EvaluatedModel],
    tmp_path: Path,
    task: str,
    file: str,
    change,
    message: str,
    nothing_runs: None,
) -> None:
    rows = question_files()
    rows[file][1] = change(rows[file][1])
    data = write_questions(tmp_path / "data", rows)
    with pytest.raises(UserError, match=message):
        evaluate(small_models, [BENCHMARKS[task]], tmp_path / "output", data=data)


def test_missing_files_and_too_few_rows_are_named(
    small_models, questions: Path, tmp_path: Path, nothing_runs: None
) -> None:
    arc = [BENCHMARKS["arc_challenge"]]
    data = shutil.copytree(questions, tmp_path / "data")
    write_rows(data / "arc_challenge.jsonl", question_files()["arc_challenge.jsonl"][: ROWS - 2])
    with pytest.raises(
        UserError, match=r"arc_challenge.jsonl: has 25 rows, but arc_challenge needs at least 26"
    ):
        evaluate(small_models, arc, tmp_path, data=data)
    (data / "arc_challenge.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"arc_challenge.jsonl: the file is missing; arc_challenge reads arc_challenge.jsonl"
    ):
        evaluate(small_models, arc, tmp_path, data=data)
