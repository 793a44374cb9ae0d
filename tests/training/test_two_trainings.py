"""Of two trainings into one directory the second is refused, on all its ranks, and neither disturbs the
other.

RACES_SEED=1234 RACES=5 pytest -m slow -s tests/training/test_two_trainings.py
"""

import os
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from watched_trainings import Trainings, outputs, wait_until_reached

from megatron_fuse.storage import sha256_of_file
from megatron_fuse.training.only_one import LOCK

SEED = int(os.environ.get("RACES_SEED", random.randrange(2**32)))
RACES = int(os.environ.get("RACES", 30))


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    runs = Trainings(tmp_path_factory.mktemp("trainings"))
    yield runs
    runs.ranks.close()


def content(directory: Path) -> dict[Path, str]:
    return {path: sha256_of_file(path) for path in directory.rglob("*") if path.is_file()}


def stop(ranks: list[Any]) -> None:
    """Stops them with their writers, and returns when they have stopped."""
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGSTOP)
    while any(psutil.Process(rank.pid).status() != psutil.STATUS_STOPPED for rank in ranks):
        time.sleep(0.01)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_second_training_is_refused_on_all_its_ranks(
    trainings: Trainings, tmp_path: Path, world_size: int
) -> None:
    expected, operations = trainings.undisturbed(world_size, False)
    at = random.Random(f"{SEED} {world_size}").randint(operations // 4, operations * 3 // 4)
    workdir = tmp_path / "run"
    shared, first = trainings.start(workdir, world_size, False, at, holds=True)
    wait_until_reached(shared, first)
    stop(first)
    before = content(workdir / "training")
    _, second = trainings.start(workdir, world_size, False)
    assert trainings.ranks.wait(second) == [2] * world_size, outputs(workdir)
    assert content(workdir / "training") == before, f"RACES_SEED={SEED}"
    owner = (
        rf"process {shared.pids[0]} on {re.escape(socket.gethostname()[:64])} since \d{{4}}-\d\d-\d\d "
        r"\d\d:\d\d:\d\d UTC"
    )
    assert re.search(
        rf"error: {workdir}/training/checkpoints: another run writes there \({owner}\)", outputs(workdir)[0]
    )

    _, elsewhere = trainings.start(workdir, world_size, False, save=tmp_path / "elsewhere")
    assert trainings.ranks.wait(elsewhere) == [0] * world_size, outputs(workdir)  # of the same data
    for rank in first:
        os.killpg(rank.pid, signal.SIGCONT)
    shared.release()
    assert trainings.ranks.wait(first) == [0] * world_size, outputs(workdir)
    assert trainings.records(workdir) == expected, f"RACES_SEED={SEED}"


def import_weights(rank: int, workdir: Path, target: Path) -> None:
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.target import import_hugging_face

    start_runtime()
    import_hugging_face(target, workdir / "training/checkpoints")


@pytest.mark.slow
def test_weights_are_not_imported_under_a_training(trainings: Trainings, tmp_path: Path) -> None:
    _, operations = trainings.undisturbed(1, False)
    shared, first = trainings.start(tmp_path / "run", 1, False, operations // 2, holds=True)
    wait_until_reached(shared, first)
    second = trainings.ranks.start(1, tmp_path / "run", import_weights, tmp_path / "run", trainings.target)
    assert trainings.ranks.wait(second) == [2]
    assert not (tmp_path / "run/training/checkpoints/iter_0000000").exists()
    shared.release()
    assert trainings.ranks.wait(first) == [0]


def race(trainings: Trainings, workdir: Path, draw: random.Random) -> list[list[int]]:
    """Starts two to four trainings at about once; their ranks' exit codes.

    All that was recorded is what one alone would have.
    """
    world_size, asynchronous = draw.choice([1, 1, 2]), draw.random() < 0.5
    expected, _ = trainings.undisturbed(world_size, asynchronous)
    jobs: list[list[Any]] = []
    for _ in range(draw.randint(2, 4)):
        jobs.append(trainings.start(workdir, world_size, asynchronous)[1])
        time.sleep(draw.choice([0, draw.uniform(0, 2)]))
    codes = [trainings.ranks.wait(job) for job in jobs]
    assert all(set(job) in ({0}, {2}) for job in codes) and [0] * world_size in codes, (
        codes,
        outputs(workdir),
    )
    assert trainings.records(workdir) == expected
    names = {path.name for path in (workdir / "training/checkpoints").iterdir()}
    assert names >= {"iter_0000007", "iter_0000009"} and not any(name.endswith(".tmp") for name in names)
    assert not (workdir / "training" / LOCK).exists()
    return codes


@pytest.mark.slow
def test_of_many_trainings_started_at_once_one_trains(trainings: Trainings, tmp_path: Path) -> None:
    draw, began, ends = random.Random(SEED), time.monotonic(), Counter[int]()
    for number in range(RACES):
        print(f"RACES_SEED={SEED}: race {number}", flush=True)
        ends.update(job[0] for job in race(trainings, tmp_path / str(number), draw))
    print(
        f"RACES_SEED={SEED}: {RACES} races of {ends.total()} trainings in {time.monotonic() - began:.0f} s: "
        f"{dict(ends)}"
    )
