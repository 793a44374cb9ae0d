"""Makes the plans of docs/scaling.md again: runs every command that the page quotes.

    python examples/scaling/page.py

Needs no GPU, no weights and no data. The recipes beside this file name models of which only config.json
exists.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

from megatron_fuse.cli.main import main as megatron_fuse
from megatron_fuse.errors import exit_code

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
_QUOTED = re.compile(r"```text\n\$ megatron-fuse (?P<words>[^\n]+)\n.*?```", re.DOTALL)


def updated(page: str) -> str:
    """The page with the output of every command that it quotes."""
    return _QUOTED.sub(_with_output, page)


def _with_output(quoted: re.Match[str]) -> str:
    words, printed = quoted["words"], io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
        megatron_fuse(shlex.split(words))
    return f"```text\n$ megatron-fuse {words}\n{printed.getvalue()}```"


def main() -> None:
    # What libraries warn of at their import is not part of a plan.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
