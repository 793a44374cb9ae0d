"""The law of campaign.py over all targets: 300 cases in a plain run, FUZZ_CASES (20,000) under `slow`.

FUZZ_SEED: another draw. FUZZ_TARGET: only the targets whose name begins so. FUZZ_CASE: with both, this case
alone. FUZZ_COUNTS: a file that gets the counts of every target as one JSON line.
"""

import os
from functools import cache
from pathlib import Path

import pytest
from campaign import Result, all_targets, run_campaign, run_case, shares

PLAIN_CASES, SLOW_CASES = 300, int(os.environ.get("FUZZ_CASES", 20_000))
SEED = int(os.environ.get("FUZZ_SEED", 1))
ONLY = os.environ.get("FUZZ_TARGET", "")
TARGETS = {name: target for name, target in all_targets().items() if name.startswith(ONLY)}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@cache
def seeds_of(name: str, root: Path) -> Path:
    directory = root / name / "seeds"
    directory.mkdir(parents=True)
    TARGETS[name].make_seeds(directory)
    return directory


def judge(result: Result) -> None:
    print(result.line())
    if counts := os.environ.get("FUZZ_COUNTS"):
        with open(counts, "a", encoding="utf-8") as file:
            file.write(result.line() + "\n")
    shown = [
        f"FUZZ_TARGET={result.target} FUZZ_SEED={result.seed} FUZZ_CASE={fault.case}: {fault.kind}: "
        f"{fault.file}: {fault.what}\n"
        f"    {fault.detail}"
        for fault in result.faults[: int(os.environ.get("FUZZ_SHOWN", 20))]
    ]
    if shown:
        pytest.fail(f"{len(result.faults)} faults: {result.line()}\n" + "\n".join(shown), pytrace=False)


def fuzz(name: str, root: Path, cases: range) -> None:
    judge(run_campaign(TARGETS[name], seeds_of(name, root), root / name, seed=SEED, cases=cases))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(name: str, root: Path) -> None:
    fuzz(name, root, range(shares(TARGETS, PLAIN_CASES)[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files_are_read_or_refused(name: str, root: Path) -> None:
    plain = shares(TARGETS, PLAIN_CASES)[name]
    fuzz(name, root, range(plain, plain + shares(TARGETS, SLOW_CASES)[name]))


@pytest.mark.skipif("FUZZ_CASE" not in os.environ, reason="FUZZ_TARGET, FUZZ_SEED and FUZZ_CASE name no case")
def test_one_case(root: Path) -> None:
    target = TARGETS[ONLY]
    outcome = run_case(
        target, seeds_of(ONLY, root), root / ONLY, seed=SEED, case=int(os.environ["FUZZ_CASE"])
    )
    print(outcome, f"files: {root / ONLY / 'case'}")
    assert not outcome.fault, outcome.detail
