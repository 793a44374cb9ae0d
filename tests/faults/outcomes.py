"""What came of a campaign's cases: a JSON line for each, and the table of their counts in
docs/reliability.md.

    FAULT_OUTCOMES=faults.jsonl python -m pytest tests/faults -m slow
    python tests/faults/outcomes.py faults.jsonl                        # writes the table between its marks

The first line says when and by which code the campaign ran.
"""

import argparse
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- written by tests/faults/outcomes.py -->\n", "<!-- end -->\n"

SEED = os.environ.get("FAULT_SEED", "0")
CASES = int(os.environ.get("FAULT_CASES", "100"))  # of every kind, in the slow tests

Row = dict[str, Any]


def head() -> Row:
    """What a campaign's outcomes begin with."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short=10", "HEAD")
        + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "machine": f"{os.cpu_count()} CPU cores, Linux {platform.release().split('-')[0]}",
        "seed": SEED,
        "cases": CASES,
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Appends; all processes of a campaign write to one file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(heads: Sequence[Row], rows: Sequence[Row]) -> str:
    """Markdown: cases by kind of fault and command, and what came of them by kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    cases = Counter((row["kind"], row["target"]) for row in rows)
    bad = Counter((row["kind"], row["target"]) for row in rows if row["problem"])

    def cell(kind: str, target: str) -> str:
        count, broken = cases[kind, target], bad[kind, target]
        return f"{count - broken} of {count}" if broken else str(count) if count else ""

    def line(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    first = heads[0]
    commits = ", ".join(dict.fromkeys(of["commit"] for of in heads))
    processes = sum(len(row.get("codes", [])) for row in rows)
    lines = [
        f"{first['date']}, commit {commits}, {first['machine']}, seed "
        f"{', '.join(dict.fromkeys(of['seed'] for of in heads))}: "
        f"{len(rows):,} cases of {processes:,} processes, {sum(bad.values())} of them against the promises.",
        "",
        line("", *kinds),
        line("---", *["---:"] * len(kinds)),
        *(line(f"`{target}`", *(cell(kind, target) for kind in kinds)) for target in targets),
        "",
        line("kind", "cases", "what came of it", "exit codes"),
        line("---", "---:", "---", "---"),
    ]
    for kind in kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        outcomes = Counter("against the promises" if row["problem"] else row["outcome"] for row in of_kind)
        codes = Counter(code for row in of_kind for code in row.get("codes", []))
        lines.append(
            line(
                kind,
                str(len(of_kind)),
                ", ".join(f"{name}: {count}" for name, count in outcomes.most_common()),
                ", ".join(
                    f"{'killed' if code < 0 else code}: {count}"
                    for code, count in sorted(codes.items(), reverse=True)
                ),
            )
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outcomes", type=Path, nargs="+")
    arguments = parser.parse_args()
    found = [
        json.loads(line)
        for path in arguments.outcomes
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    heads, rows = [row for row in found if "commit" in row], [row for row in found if "kind" in row]
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(heads, rows)}\n{END}{after}", encoding="utf-8")
    print(f"{DOCUMENT}: {len(rows)} cases")


if __name__ == "__main__":
    main()
