"""Kills, races, stopped processes, full disks and damaged files: the law of kinds.py holds after each.

FAULT_SEED=7 python -m pytest tests/faults                    # a few of each kind, drawn from another seed
FAULT_CASES=1000 python -m pytest tests/faults -m slow        # default: 100 of each kind; outcomes.py makes a
                                                              table of them
"""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kinds import KINDS
from outcomes import CASES
from plans import BY_CLAIM, MANNERS
from stages import STAGES
from targets import Target

from megatron_fuse.errors import exit_code

Campaign = Callable[[str, list[Target], int], None]
slow = pytest.mark.slow


def kinds(few: dict[str, int]) -> list:
    """Every kind with some cases in the plain run, and with many in the slow one. few: by kind, default 1."""
    kinds = [kind for kind in KINDS if kind != "interrupted"]  # which commands alone know how to end at
    plain = [pytest.param(kind, few.get(kind, 1), id=kind) for kind in kinds if few.get(kind, 1)]
    return plain + [pytest.param(kind, CASES, marks=slow, id=f"{kind}, many") for kind in kinds]


@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: manner.strip() or "by lock")
@pytest.mark.parametrize(
    ("kind", "cases"), kinds({"raced": 4, "stopped": 2, "killed in a race": 2, "damaged": 8})
)
def test_shards_alone(
    plans: dict[str, Target], campaign: Campaign, kind: str, cases: int, manner: str
) -> None:
    campaign(kind, [plans[f"run_plan{manner}"], plans[f"run_plans{manner}"]], cases)


_LONG = dict.fromkeys(("raced by four", "stopped", "full", "file size", "read-only"), 0)


# The cases take the stages in turn, from another one on for each kind.
@pytest.mark.parametrize(("kind", "cases"), kinds({**_LONG, "killed": len(STAGES)}))
def test_data_stages(stages: dict[str, Target], campaign: Campaign, kind: str, cases: int) -> None:
    place, targets = list(KINDS).index(kind), list(stages.values())
    campaign(kind, targets[place % len(targets) :] + targets[: place % len(targets)], cases)


@pytest.mark.parametrize("cases", [len(STAGES), pytest.param(CASES, marks=slow)])
def test_data_stages_by_claim(stages: dict[str, Target], campaign: Campaign, cases: int) -> None:
    campaign("stopped", [replace(stage, environments=(BY_CLAIM,)) for stage in stages.values()], cases)


@pytest.mark.parametrize("cases", [len(STAGES), pytest.param(CASES, marks=slow)])
def test_interrupted_data_stages(stages: dict[str, Target], campaign: Campaign, cases: int) -> None:
    campaign("interrupted", list(stages.values()), cases)


@slow
@pytest.mark.parametrize("tool", STAGES)
def test_races_over_each_data_stage(stages: dict[str, Target], campaign: Campaign, tool: str) -> None:
    campaign("raced by four", [stages[tool]], CASES)


@slow
@pytest.mark.parametrize("kind", ["killed", "raced", "full"])
def test_reports(reports: dict[str, Target], campaign: Campaign, kind: str) -> None:
    campaign(kind, list(reports.values()), CASES)


@slow
@pytest.mark.parametrize("kind", ["killed", "raced", "full"])
def test_evaluation(evaluation: Target, campaign: Campaign, kind: str) -> None:
    campaign(kind, [evaluation], -(-CASES // 5))  # each loads two models several times


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("killed", 1),
        ("raced", 1),
        *(pytest.param(kind, CASES, marks=slow) for kind in ("killed", "raced", "full")),
    ],
)
def test_experiments(experiment: Target, campaign: Campaign, kind: str, cases: int) -> None:
    campaign(kind, [experiment], cases)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_command_ends_with_2_though_its_log_is_full(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def main() -> None:
        raise OSError(number, os.strerror(number))  # as print raises it, without a file's name

    with open("/dev/full", "w", buffering=1) as log:
        monkeypatch.setattr("sys.stderr", log)
        try:
            assert exit_code(main) == 2
        finally:
            monkeypatch.undo()
            os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # takes what is still in the buffer
