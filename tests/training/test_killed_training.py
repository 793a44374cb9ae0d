"""A training that is killed, in part or as a whole, or stopped and continued, at any moment, ends with the
losses of one left alone.

pytest -m slow -s tests/training/test_killed_training.py               # prints the seed, and what was done
                                                                       when, in counts
KILL_SEED=1234 KILL_MOMENTS=20 pytest -m slow -s tests/training/test_killed_training.py
"""

import dataclasses
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watched_trainings import PHASES, Kind, Moment, Trainings, outputs

SEED = int(os.environ.get("KILL_SEED", random.randrange(2**32)))
MOMENTS = int(os.environ.get("KILL_MOMENTS", 100))


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    runs = Trainings(tmp_path_factory.mktemp("trainings"))
    yield runs
    runs.ranks.close()


def draw_moment(draw: random.Random, trainings: Trainings, kind: Kind | None = None, **given: Any) -> Moment:
    """given: fields that are not drawn."""
    kind = kind or draw.choice(list(Kind))
    world_size = given.get("world_size", 2 if kind == Kind.RANK_OF_TORCHRUN else draw.choice([1, 2]))
    asynchronous = given.get("asynchronous", draw.random() < 0.5)
    _, operations = trainings.undisturbed(world_size, asynchronous)
    delay = draw.choice([0.0, draw.uniform(0, 0.05)])
    return Moment(
        kind, world_size, asynchronous, draw.randint(1, operations), delay, draw.randrange(world_size)
    )


def check_moments(trainings: Trainings, workdir: Path, moments: list[Moment], context: str) -> None:
    """Interrupts one job at these moments, one after another, then lets it end, and compares all that it
    recorded.
    """
    expected, _ = trainings.undisturbed(moments[0].world_size, moments[0].asynchronous)
    for moment in moments:
        trainings.interrupted(workdir, moment)
    _, children = trainings.start(workdir, moments[0].world_size, moments[0].asynchronous)
    codes = trainings.ranks.wait(children)
    trainings.ranks.wait_for_nothing_left()
    assert not any(codes), (context, outputs(workdir))
    found = trainings.records(workdir)
    # Told to stop by the end of torchrun, a run leaves out the evaluation that would be due.
    skipped = (
        {key for key in expected if key[1]}
        if any(moment.kind == Kind.TORCHRUN for moment in moments)
        else set()
    )
    assert expected.keys() - skipped <= found.keys() <= expected.keys(), context
    assert all(record == expected[key] for key, record in found.items()), context
    names = {path.name for path in (workdir / "training/checkpoints").iterdir()}
    assert "iter_0000009" in names and not any(name.endswith(".tmp") for name in names), context
    # The last two are kept, of which the first is not that of the first phase's end where a run was stopped
    # after step 8.
    assert names & {"iter_0000007", "iter_0000008"}, context


@pytest.mark.parametrize("kind", [Kind.RANK, Kind.TORCHRUN])
def test_interrupted_at_a_moment_it_ends_with_the_same_losses(
    trainings: Trainings, tmp_path: Path, kind: Kind
) -> None:
    moment = draw_moment(random.Random(f"{SEED} {kind}"), trainings, kind, world_size=2, asynchronous=True)
    check_moments(trainings, tmp_path / "run", [moment], f"KILL_SEED={SEED}: {moment}")


@pytest.mark.slow
def test_interrupted_at_many_moments_it_ends_with_the_same_losses(
    trainings: Trainings, tmp_path: Path
) -> None:
    draw, began = random.Random(SEED), time.monotonic()
    trainings.counts.clear()
    while (number := trainings.counts.total()) < MOMENTS:
        moments = [draw_moment(draw, trainings)]
        if draw.random() < 0.2:  # once more in what is left
            again = draw.randint(1, max(moments[0].at, 2) // 2)
            moments.append(dataclasses.replace(moments[0], at=again))
        check_moments(trainings, tmp_path / str(number), moments, f"KILL_SEED={SEED}: {moments}")
    print(f"\nKILL_SEED={SEED}: {trainings.counts.total()} moments in {time.monotonic() - began:.0f} s")
    for kind in Kind:
        parts = ", ".join(f"{trainings.counts[kind, phase]} {phase}" for phase in PHASES)
        print(f"{kind}: {sum(trainings.counts[kind, phase] for phase in PHASES)} ({parts})")
