"""The report of the project's own experiments says what the committed CSV files say, to the digit."""

from pathlib import Path

import pytest

from megatron_fuse.cli import experiments
from megatron_fuse.experiments import report

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ["experiments", "source_sets", "merging", "search"]


def test_the_report_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    written = {}
    monkeypatch.setattr(report, "save_text", lambda path, text: written.update({path: text}))
    monkeypatch.setattr(report, "save_picture", lambda *_: None)
    files = [Path(f"examples/skills/{name}.yaml") for name in EXPERIMENTS]
    experiments._report(files, None, Path("docs/RESULTS.md"))
    assert written == {Path("docs/RESULTS.md"): Path("docs/RESULTS.md").read_text(encoding="utf-8")}
