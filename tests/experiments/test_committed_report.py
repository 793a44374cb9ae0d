"""The report of the project's own experiments says what the committed CSV files say, to the digit."""

import re
from pathlib import Path

import pytest

from megatron_fuse.cli import experiments
from megatron_fuse.experiments import report
from megatron_fuse.experiments.results import read_results

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ["map", "experiments", "source_sets", "merging", "search"]


def test_the_report_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    written = {}
    monkeypatch.setattr(report, "save_text", lambda path, text: written.update({path: text}))
    monkeypatch.setattr(report, "save_picture", lambda *_: None)
    files = [Path(f"examples/skills/{name}.yaml") for name in EXPERIMENTS]
    experiments._report(files, None, Path("docs/RESULTS.md"))
    assert written == {Path("docs/RESULTS.md"): Path("docs/RESULTS.md").read_text(encoding="utf-8")}


def test_the_table_of_the_readme_is_that_of_the_report() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report_text = (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")
    _, _, rest = report_text.partition("\n## The typical case")
    typical = rest.partition("\n## ")[0]
    _, _, rest = readme.partition("## Does it help?")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    cells = [cell.strip() for line in lines[1:] for cell in line.strip("|").split("|")[1:]]
    assert len(cells) == 15
    assert [cell for cell in cells if not re.search(rf"\| {re.escape(cell)}( ± \d+\.\d)? \|", typical)] == []


def test_the_numbers_in_the_text_of_the_readme_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = re.search(
        r"is (\d\.\d) points above fine-tuning, and (\d\.\d) above the same KL to the target", text
    )
    assert found

    def percent(variant: str) -> float:
        """Mean over the seeds of all six skills."""
        rows = read_results(ROOT / "docs/results/map.csv")
        values = [row.value for row in rows if (row.variant, row.metric) == (variant, "generation")]
        assert len(values) == 5
        return sum(values) / len(values)

    above = [percent("wrong_50/category_2") - percent(f"wrong_50/{other}") for other in ("csft", "self_2")]
    assert [f"{difference:.1f}" for difference in above] == list(found.groups())
