"""Kills, races, stopped processes, full disks and damaged files: the law of kinds.py holds after each.

FAULT_SEED=7 python -m pytest tests/faults                    # a few of each kind, drawn from another seed
FAULT_CASES=1000 python -m pytest tests/faults -m slow        # default: 100 of each kind; outcomes.py makes a table of them
"""

from collections.abc import Callable

import pytest
from kinds import KINDS
from outcomes import CASES
from stages import STAGES
from targets import Target

Campaign = Callable[[str, list[Target], int], None]
slow = pytest.mark.slow


def kinds(few: dict[str, int]) -> list:
    """Every kind with some cases in the plain run, and with many in the slow one. few: by kind, default 1."""
    plain = [pytest.param(kind, few.get(kind, 1), id=kind) for kind in KINDS if few.get(kind, 1)]
    return plain + [pytest.param(kind, CASES, marks=slow, id=f"{kind}, many") for kind in KINDS]


@pytest.mark.parametrize(("kind", "cases"), kinds({"raced": 12, "stopped": 6, "killed in a race": 6, "damaged": 10}))
def test_shards_alone(plans: dict[str, Target], campaign: Campaign, kind: str, cases: int) -> None:
    for target in plans.values():
        campaign(kind, [target], cases)


# The cases go round the stages: those of the plain run meet each stage with another kind.
@pytest.mark.parametrize(("kind", "cases"), kinds({"file size": 0, "read-only": 0, "full": 0}))
def test_data_stages(stages: dict[str, Target], campaign: Campaign, kind: str, cases: int) -> None:
    names = list(STAGES)
    place = list(KINDS).index(kind)
    campaign(kind, [stages[names[(place + n) % len(names)]] for n in range(len(names))], cases)


@slow
@pytest.mark.parametrize("tool", STAGES)
def test_races_over_each_data_stage(stages: dict[str, Target], campaign: Campaign, tool: str) -> None:
    campaign("raced by four", [stages[tool]], CASES)


@pytest.mark.parametrize("kind", ["killed", pytest.param("raced", marks=slow), pytest.param("damaged", marks=slow)])
@pytest.mark.parametrize("tool", ["report advantage", "report alignment"])
def test_reports(stages: dict[str, Target], campaign: Campaign, tool: str, kind: str) -> None:
    campaign(kind, [stages[tool]], CASES)
