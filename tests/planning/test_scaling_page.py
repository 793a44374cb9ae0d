"""docs/scaling.md holds the plans that its commands print."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_output_of_its_commands() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\$ megatron-fuse plan ", page, re.M)) == 4
    updated = runpy.run_path(str(ROOT / "examples" / "scaling" / "page.py"))["updated"]
    assert updated(page) == page, "run python examples/scaling/page.py"
