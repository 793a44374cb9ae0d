"""docs/real_model.md gives the numbers of the CSV files, and no others in its tables."""

import csv
import re
from pathlib import Path

import pytest

from megatron_fuse.experiments.layers import load_experiment
from megatron_fuse.experiments.report import Reported, write_report
from megatron_fuse.experiments.results import read_results

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "real_model.md"
TAILS = ("bucket", "renormalize", "ignore")


def table_under(heading: str) -> list[str]:
    """The rows of the first table below a heading, without its first two lines."""
    lines = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].splitlines()
    rows = [line for line in lines[: next(n for n, line in enumerate(lines) if line[:3] == "## ")] if line]
    return [line for line in rows if line.startswith("|")][2:]


def test_the_table_of_identical_students_is_that_of_the_file() -> None:
    with (ROOT / "docs/results/real_model_identical.csv").open(encoding="utf-8", newline="") as file:
        forms: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
        for row in csv.DictReader(file):
            key = tuple(
                f"{float(row[name]):g}"
                for name in ("teacher_temperature", "student_temperature", "top_k", "top_p")
            )
            forms.setdefault(key, {})[row["tail"]] = row
    expected = []
    for (teacher, student, top_k, top_p), tails in forms.items():
        any_tail = tails["bucket"]
        shares = [f"{100 * float(any_tail[name]):.0f} %" for name in ("mass", "below_half")]
        losses = [f"{float(tails[tail]['kl']):.2f} ({float(tails[tail]['gradient']):.2f})" for tail in TAILS]
        expected.append("| " + " | ".join([f"{teacher} / {student}", top_k, top_p, *shares, *losses]) + " |")
    assert sorted(table_under("A student that is its own teacher")) == sorted(expected)


def test_the_tables_of_trainings_are_the_report_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(Path("examples/real_model/experiments.yaml"))
    in_tmp_path = experiment.model_copy(update={"results": tmp_path / "real_model.csv"})  # where pictures go
    tables = (
        ("Trainings", "loss", "held_out"),
        ("Other forms of the loss", "forms", "held_out"),
        ("Accuracies", "loss", "tasks"),
    )
    for heading, name, split in tables:
        results = [each for each in read_results(experiment.results) if each.split == split]
        report = tmp_path / f"{split}.md"
        write_report([Reported(in_tmp_path, results, "command")], report)
        rows, reported = table_under(heading), report.read_text(encoding="utf-8").splitlines()
        assert len(rows) == len(experiment.tables[name].rows)
        assert not [row for row in rows if row not in reported]


def test_the_numbers_of_the_summary_are_in_the_tables() -> None:
    summary = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    headings = ("A student that is its own teacher", "Trainings", "Other forms of the loss")
    cells = " ".join(cell for heading in headings for cell in table_under(heading))
    numbers = re.findall(r"\d+ %|\d+\.\d", summary)
    assert len(numbers) >= 7 and not [number for number in numbers if number not in cells]
