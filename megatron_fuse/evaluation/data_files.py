"""The files of an offline evaluation: every row is looked at before a model is, as the harness itself would stop in the middle of it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.benchmarks import Benchmark
from megatron_fuse.storage import read_jsonl, sha256_of_file

_LETTERS = "ABCD"


def check_files(benchmark: Benchmark, directory: Path) -> dict[str, str]:
    """sha256 of every file that a benchmark reads from a directory of JSONL files.

    Raises UserError for a missing file, a row without a key that the task needs, a right answer that is none of the options, and
    too few rows for the few-shot examples.
    """
    rows = {name: _rows_of(benchmark, directory / name) for name in benchmark.files}
    questions, *_ = rows
    if benchmark.examples_in_same_file and len(rows[questions]) <= benchmark.shots:
        raise UserError(
            f"{directory / questions}: has {len(rows[questions])} rows; {benchmark.name} needs at least {benchmark.shots + 1}, "
            f"as the {benchmark.shots} examples of every question are other rows of this file"
        )
    if benchmark.name == "mmlu":
        _check_subjects(benchmark, directory, *rows.values())
    return {name: sha256_of_file(directory / name) for name in benchmark.files}


def _rows_of(benchmark: Benchmark, path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        names = ", ".join(benchmark.files)
        raise UserError(
            f"{path}: there is no such file; {benchmark.name} reads {names} from --data (docs/evaluation.md)"
        )
    rows = []
    for number, row in read_jsonl(path):
        missing = [key for key in benchmark.files[path.name] if key not in row]
        if missing:
            needed = ", ".join(benchmark.files[path.name])
            raise UserError(f"{path}:{number}: has no {', '.join(missing)}: rows of {benchmark.name} need {needed}")
        problem = _wrong_answer(benchmark, row)
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _wrong_answer(benchmark: Benchmark, row: Mapping[str, Any]) -> str:
    """What is wrong with a row's right answer; "" where nothing is. The harness counts such a row as failed by every model."""
    if benchmark.options:
        options, right = benchmark.options
        count = len(row[options])
        if type(row[right]) is not int or not 0 <= row[right] < count:
            return f"{right} is {row[right]!r}, which must be the index of one of {count} {options}"
    if benchmark.name == "mmlu" and (row["answer"] not in (*_LETTERS, *range(4)) or len(row["choices"]) != 4):
        return f"answer is {row['answer']!r} of {len(row['choices'])} choices: it must be a letter from A to D or 0 to 3, of 4"
    if benchmark.name == "truthfulqa_mc2":
        targets = row["mc2_targets"]
        if len(targets["choices"]) != len(targets["labels"]) or 1 not in targets["labels"]:
            return "mc2_targets must have a label for every choice, at least one of them 1"
    return ""


def _check_subjects(
    benchmark: Benchmark, directory: Path, questions: list[dict[str, Any]], examples: list[dict[str, Any]]
) -> None:
    there = Counter(row["subject"] for row in examples)
    for subject in dict.fromkeys(row["subject"] for row in questions):
        if there[subject] < benchmark.shots:
            _, name = benchmark.files
            raise UserError(
                f"{directory / name}: has {there[subject]} examples of the subject {subject!r}; "
                f"{benchmark.name} needs {benchmark.shots}"
            )
