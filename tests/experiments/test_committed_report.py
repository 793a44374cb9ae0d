"""The report of the project's own experiments says what the committed CSV files say, to the digit."""

import re
from pathlib import Path

import pytest

from megatron_fuse.cli import experiments
from megatron_fuse.experiments import report

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
