"""tools/check_gpu.py: what becomes of a check that crashes, hangs or comes too late, and the whole command
without a GPU.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from megatron_fuse import gpu_checks
from megatron_fuse.errors import UserError
from megatron_fuse.gpu_checks import MINUTES, Check, Row
from megatron_fuse.gpu_checks.runner import process_context, rows_of, run_checks
from megatron_fuse.planning import GPUS, assumed_rates, read_rates
from megatron_fuse.planning.rates import MEASURED

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tools/check_gpu.py"


def example(name: str, seconds: float = 60) -> Check:
    return Check(name, "gpu_check_examples", seconds)


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples do not need. The environment is as it was afterwards."""
    monkeypatch.setattr("megatron_fuse.gpu_checks.runner.LIBRARIES", ())
    monkeypatch.setattr(os, "environ", os.environ.copy())


def checked(output: Path, *checks: Check, minutes: float = MINUTES) -> dict[str, list[Row]]:
    """The rows of each check."""
    rows = run_checks(checks, device="cpu", minutes=minutes, output=output)
    return {check.name: [row for row in rows if row.check == check.name] for check in checks}


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "checks.jsonl").read_text().splitlines()]


def test_rows_are_printed_and_written(tmp_path: Path) -> None:
    (rows,) = checked(tmp_path, example("good")).values()
    assert [(row.what, row.verdict) for row in rows] == [
        ("device", ""),
        ("speed", "ok"),
        ("a | b", "not run"),
    ]
    assert lines(tmp_path) == [{"verdict": row.verdict, **vars(row)} for row in rows]
    table = (tmp_path / "checks.md").read_text()
    assert "| good | speed | 5 | km/h | >= 4 | ok |" in table and "1 ok, 0 FAILED, 1 not run" in table
    assert r"| good | a \| b |  |  |  | not run: of another machine |" in table
    assert (tmp_path / "good.log").read_text() == "said by good\n" and (tmp_path / "good/file").exists()


@pytest.mark.parametrize(
    ("name", "said"), [("crashing", "RuntimeError: broken in the middle"), ("killed", "ended by SIGKILL")]
)
def test_a_check_that_dies_keeps_its_rows_and_takes_no_other_along(
    tmp_path: Path, name: str, said: str
) -> None:
    found = checked(tmp_path, example(name), example("good"))
    assert [(row.what, row.ok) for row in found[name]] == [
        ("device", None),
        ("before", None),
        ("the rest of it", False),
    ]
    assert said in found[name][-1].reason and str(tmp_path / f"{name}.log") in found[name][-1].reason
    assert len(found["good"]) == 3
    assert [line["check"] for line in lines(tmp_path)] == [name] * 3 + ["good"] * 3


def test_a_check_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    found = checked(tmp_path, example("hanging", seconds=5), example("good"))
    rows = {row.what: row for row in found["hanging"]}
    assert rows["the rest of it"].ok is False and "took more than 5 s" in rows["the rest of it"].reason
    assert not is_running(rows["child"].value) and len(found["good"]) == 3


def test_a_fresh_process_does_what_a_fork_does(tmp_path: Path) -> None:
    """As on a GPU."""
    rows = list(rows_of(example("good"), "elsewhere", tmp_path / "good", process_context("cuda"), left=600))
    assert [(row.what, row.value) for row in rows] == [
        ("device", "elsewhere"),
        ("speed", 5.0),
        ("a | b", None),
    ]
    assert (tmp_path / "good.log").read_text() == "said by good\n"


def is_running(process: int) -> bool:
    """Not if it is a zombie that nobody has waited for."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_has_no_time_left_is_not_run(tmp_path: Path) -> None:
    found = checked(tmp_path, example("hanging"), example("good"), minutes=5 / 60)
    assert (last := found["hanging"][-1]).verdict == "not run" and last.reason == "no time left after 5 s"
    (only,) = found["good"]
    assert only.verdict == "not run" and only.reason == "no time left"
    assert not (tmp_path / "good").exists()


def test_a_longer_run_gives_each_check_its_share(tmp_path: Path) -> None:
    found = checked(tmp_path, example("hanging", seconds=1), minutes=4 * MINUTES)
    assert "took more than 4 s" in found["hanging"][-1].reason


def test_a_figure_that_is_no_number_has_failed(tmp_path: Path) -> None:
    (rows,) = checked(tmp_path, example("undefined")).values()
    assert [(row.ok, row.reason) for row in rows[1:]] == [(False, "is nan"), (False, "is inf")]
    assert [line["value"] for line in lines(tmp_path)[1:]] == [None, None]


def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"--out {tmp_path} already exists and is not empty"):
        checked(tmp_path, example("good"))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def run_command(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The exit code of the command in this process, where "good" and "slow" are the checks."""
    monkeypatch.setattr("megatron_fuse.cli.check_gpu.CHECKS", (example("good"), example("slow")))
    monkeypatch.setattr(sys, "argv", [str(COMMAND), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(COMMAND), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(("only", "code"), [(["good"], 0), (["slow", "good"], 1), ([], 1)], ids=str)
def test_the_exit_code_says_whether_all_is_well(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: list[str],
    code: int,
) -> None:
    options = ["--only", *only] if only else []
    assert run_command(monkeypatch, "--device", "cpu", "--out", str(tmp_path / "out"), *options) == code
    assert {line["check"] for line in lines(tmp_path / "out")} == set(only or ["good", "slow"])
    printed = capsys.readouterr().out
    assert (
        tmp_path / "out/checks.md"
    ).read_text().strip() in printed and f"written to {tmp_path / 'out'}" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "bad", "--device", "cpu"], "invalid choice: 'bad' (choose from "),
        (["--minutes", "0", "--device", "cpu"], "--minutes is 0, but it must be above 0"),
        (["--minutes", "nan", "--device", "cpu"], "--minutes is nan, but it must be above 0"),
        ([], "torch finds no GPU. Use --device cpu to run the same code"),
    ],
)
def test_bad_usage_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    assert run_command(monkeypatch, "--out", str(tmp_path / "out"), *options) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def exit_code_of_command(output: Path, *options: str) -> int:
    """The command in this process, for the fixture `apart`. What it prints goes to a file."""
    sys.argv = [str(COMMAND), *options]
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            runpy.run_path(str(COMMAND), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


@pytest.mark.slow
def test_the_command_ends_well_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As a user starts it."""
    command = [
        sys.executable,
        str(COMMAND),
        "--device",
        "cpu",
        "--minutes",
        "30",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "written to" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]


def test_all_checks_run_without_a_gpu(apart: Callable[..., int], tmp_path: Path) -> None:
    """At tiny sizes. Where a GPU is needed they say so, and nothing fails."""
    output = tmp_path / "output.txt"
    options = ["--device", "cpu", "--minutes", "30", "--out", str(tmp_path / "out")]
    code = apart(exit_code_of_command, output, *options)
    assert code == 0, output.read_text()[-8000:]
    rows = lines(tmp_path / "out")
    assert list(dict.fromkeys(row["check"] for row in rows)) == [check.name for check in gpu_checks.CHECKS]
    measured = {row["check"] for row in rows if row["value"] is not None}
    assert measured == {check.name for check in gpu_checks.CHECKS}
    assert not any("no time left" in row["reason"] for row in rows)
    assert sum(row["verdict"] == "ok" for row in rows) > 20
    # A plan finds all of its rates in the file.
    rates = read_rates(tmp_path / "out/checks.jsonl", assumed_rates(GPUS["H200-141"]))
    assert {name for name, words in rates.origins.items() if "measured" in words} == MEASURED.keys()
