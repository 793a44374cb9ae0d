"""examples/walkthrough.py shows what the method says: its printed tables are read back and compared with
each other.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "Sorted: fig, pear."  # whose captures and projections are printed

Table = list[dict[str, str]]


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    """Title -> rows of every table that the script prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "examples/walkthrough.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    found = {}
    for block in run.stdout.strip().split("\n\n"):
        title, heading, *rows = block.splitlines()
        names = re.split(r"  +", heading.strip())
        found[title] = [dict(zip(names, re.split(r"  +", row.strip()), strict=True)) for row in rows]
    return found


def _table(tables: dict[str, Table], title: str) -> Table:
    return next(rows for name, rows in tables.items() if name.startswith(title))


@pytest.mark.parametrize(
    "title",
    ["1. Capture: alpha", "1. Capture: beta", "2. Align and project: alpha", "2. Align and project: beta"],
)
def test_the_rows_cover_every_byte_of_the_response_and_its_end(tables: dict[str, Table], title: str) -> None:
    places = [tuple(map(int, row["bytes"].split("-"))) for row in _table(tables, title)]
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]
    assert places[-1] == (len(EXAMPLE), len(EXAMPLE) + 1)  # the stop token, which is supervised


@pytest.mark.parametrize("source", ["alpha", "beta"])
def test_captured_rows_are_parts_of_distributions(tables: dict[str, Table], source: str) -> None:
    for row in _table(tables, f"1. Capture: {source}"):
        assert 0 < float(row["mass"]) <= 1 and 1 <= int(row["entries"]) <= 10
        # Both are rounded to three digits.
        assert float(row["mass"]) + float(row["tail"]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("source", ["alpha", "beta"])
def test_projected_rows_hold_at_most_all_the_mass(tables: dict[str, Table], source: str) -> None:
    rows = _table(tables, f"2. Align and project: {source}")
    for row in rows:
        assert row["match"] == ("skip" if row[f"row of {source}"].startswith("inside") else "exact")
        assert (
            (0 < float(row["mass"]) <= 1)
            if row["match"] == "exact"
            else float(row["mass"]) == int(row["entries"]) == 0
        )
    starts = {row["bytes"].split("-")[0] for row in _table(tables, f"1. Capture: {source}")}
    assert {row["bytes"].split("-")[0] for row in rows if row["match"] == "exact"} == starts
    # Alpha's tokenizer is the target's.
    assert any(row["match"] == "skip" for row in rows) == (source == "beta")


def test_what_beta_knows_arrives_in_the_target_s_tokens(tables: dict[str, Table]) -> None:
    for row in _table(tables, "2. Align and project: beta"):
        if row["match"] == "exact":
            assert row["likeliest"] == row["token"]


def test_the_winner_has_the_least_cross_entropy(tables: dict[str, Table]) -> None:
    rows = _table(tables, "3. Choose")
    assert [row["winner"] for row in rows] == ["alpha", "beta"]  # each was taught its answer
    for row in rows:
        assert float(row[row["winner"]]) == min(float(row["alpha"]), float(row["beta"]))
    nats = [-math.log(float(row["probability"])) for row in _table(tables, "1. Capture: beta")]
    # The stop token is left out; rounded to three digits.
    assert float(rows[1]["beta"]) == pytest.approx(sum(nats[:-1]), abs=0.02)


def test_one_step_lowers_the_loss(tables: dict[str, Table]) -> None:
    before, after = _table(tables, "4. One training step")
    for row in (before, after):
        assert float(row["loss"]) == pytest.approx(float(row["CE"]) + 0.5 * float(row["KL"]), abs=1e-3)
        assert float(row["KL"]) > 0
    assert float(after["loss"]) < float(before["loss"])
    assert float(after["CE"]) < float(before["CE"])
