"""Checks the files of an offline evaluation. Every row is checked before a model is loaded.

The harness itself would stop at a wrong row in the middle of the evaluation.
"""

from collections import Counter
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.benchmarks import Benchmark
from megatron_fuse.evaluation.question_rows import Mmlu, Question
from megatron_fuse.storage import read_jsonl, sha256_of_file
from megatron_fuse.storage.records import parse_record, quoted


def check_files(benchmark: Benchmark, directory: Path) -> dict[str, str]:
    """File name -> sha256 of every file that a benchmark reads from a directory of JSONL files.

    Raises UserError for a missing file, a row that does not have the form of the task, a right answer that is
    not one of the options, or too few rows for the few-shot examples.
    """
    rows = {name: _rows_of(benchmark, directory / name) for name in benchmark.files}
    questions, *_ = rows
    if benchmark.examples_in_same_file and len(rows[questions]) <= benchmark.shots:
        raise UserError(
            f"{directory / questions}: has {len(rows[questions])} rows, but {benchmark.name} needs at least "
            f"{benchmark.shots + 1}: the {benchmark.shots} examples in a prompt are other rows of this file. "
            "Add rows."
        )
    if benchmark.name == "mmlu":
        subjects = [[row.subject for row in of_file if isinstance(row, Mmlu)] for of_file in rows.values()]
        _check_subjects(benchmark, directory, *subjects)
    return {name: sha256_of_file(directory / name) for name in benchmark.files}


def _rows_of(benchmark: Benchmark, path: Path) -> list[Question]:
    if not path.is_file():
        names = ", ".join(benchmark.files)
        raise UserError(
            f"{path}: the file is missing; {benchmark.name} reads {names} from --data (docs/evaluation.md). "
            "Put the file there."
        )
    form = benchmark.files[path.name]
    needed = f"A row of {benchmark.name} needs the keys {', '.join(form.model_fields)} (docs/evaluation.md)."
    rows = [parse_record(row, form, f"{path}:{number}", needed) for number, row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _check_subjects(benchmark: Benchmark, directory: Path, questions: list[str], examples: list[str]) -> None:
    counts = Counter(examples)
    for subject in dict.fromkeys(questions):
        if counts[subject] < benchmark.shots:
            _, name = benchmark.files
            raise UserError(
                f"{directory / name}: has {counts[subject]} examples of the subject {quoted(subject)}, but "
                f"{benchmark.name} needs {benchmark.shots}. Add examples."
            )
