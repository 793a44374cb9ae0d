"""Processes that take shards by claim: some are killed, and one is stopped for longer than the lease."""

import logging
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from test_shard_ownership import contents, make_shard, plan, start, wait_for

from megatron_fuse.claiming import LEASE
from megatron_fuse.errors import UserError
from megatron_fuse.storage import completed, run_plan
from megatron_fuse.storage.locks import LockFile, NoLocks

SHARDS = 12


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What one process writes that works by locks."""
    run_plan(plan(tmp_path / "whole/a", shards=SHARDS), make_shard)
    return contents(tmp_path / "whole")


@pytest.fixture(params=["locks", "no locks"])
def file_system(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    def refuse(lock: LockFile) -> LockFile:
        raise NoLocks("no locks")

    if request.param == "no locks":
        monkeypatch.setattr(LockFile, "__enter__", refuse)


def begin(directory: Path, made: Path, log: Path, *, hangs: bool) -> BaseProcess:
    """A process that leaves a file for every shard that it begins to make. hangs: it makes none of them whole
    before the file `go` is there.
    """

    def make(index: int, prefix: Path) -> dict[str, int]:
        (made / f"{os.getpid()}-{index}").touch()
        counts = make_shard(index, prefix)
        if hangs:
            wait_for((made / "go").exists)
        time.sleep(0.01)
        return counts

    def work() -> None:
        logger = logging.getLogger("megatron_fuse")
        logger.addHandler(logging.FileHandler(log))
        logger.setLevel(logging.INFO)
        run_plan(plan(directory, shards=SHARDS), make)

    return start(work)


def has_begun(process: BaseProcess, made: Path) -> bool:
    return any(made.glob(f"{process.pid}-*"))


@pytest.mark.usefixtures("file_system")
def test_six_processes_of_which_two_are_killed_and_one_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    monkeypatch.setenv(LEASE, "1")
    made, log = tmp_path / "made", tmp_path / "log"
    made.mkdir()
    directory = tmp_path / "many/a"
    killed = [begin(directory, made, log, hangs=True) for _ in range(2)]
    stopped = begin(directory, made, tmp_path / "log of the stopped one", hangs=True)
    for process in (*killed, stopped):
        wait_for(lambda process=process: has_begun(process, made))
    for process in killed:
        os.kill(process.pid, signal.SIGKILL)
    os.kill(stopped.pid, signal.SIGSTOP)
    others = [begin(directory, made, log, hangs=False) for _ in range(3)]
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0, 0]
    # All is whole while the stopped process still has the shard that it makes, and the lock file.
    found = contents(tmp_path / "many")
    found.pop(".a.lock", None)
    assert found == whole
    (made / "go").touch()
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.join(60)
    assert stopped.exitcode == 0
    lost = (tmp_path / "log of the stopped one").read_text()
    assert "another process has taken over shard" in lost
    assert contents(tmp_path / "many") == whole
    artifact = completed(plan(directory, shards=SHARDS))
    assert artifact is not None
    artifact.verify()
    # The shards of the killed and of the stopped processes were made by others.
    begun = [int(path.name.split("-")[1]) for path in made.glob("*-*")]
    assert sorted(set(begun)) == list(range(SHARDS)) and len(begun) >= SHARDS + 3


@pytest.mark.usefixtures("file_system")
def test_a_stopped_process_that_goes_on_in_time_keeps_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEASE, "600")
    made = tmp_path / "made"
    made.mkdir()
    first = begin(tmp_path / "a", made, tmp_path / "log", hangs=True)
    wait_for(lambda: has_begun(first, made))
    os.kill(first.pid, signal.SIGSTOP)
    second = begin(tmp_path / "a", made, tmp_path / "second log", hangs=False)
    log = tmp_path / "second log"
    wait_for(lambda: log.exists() and f"which process {first.pid} on " in log.read_text())
    (made / "go").touch()
    os.kill(first.pid, signal.SIGCONT)
    for process in (first, second):
        process.join(60)
    assert [first.exitcode, second.exitcode] == [0, 0]
    assert len([*made.glob("*-*")]) == SHARDS


def test_processes_by_lock_and_by_claim_leave_each_other_s_shards_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    mixed = []
    for number in range(4):
        with monkeypatch.context() as patch:
            if number % 2:
                patch.setenv(LEASE, "600")
            mixed.append(begin(tmp_path / "many/a", made, tmp_path / "log", hangs=False))
    for process in mixed:
        process.join(60)
    assert [process.exitcode for process in mixed] == [0] * 4
    assert contents(tmp_path / "many") == whole
    assert len([*made.glob("*-*")]) == SHARDS


def test_another_plan_is_refused_beside_one_that_is_made_by_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEASE, "600")
    made = tmp_path / "made"
    made.mkdir()
    first = begin(tmp_path / "a", made, tmp_path / "log", hangs=True)
    wait_for(lambda: has_begun(first, made))
    with pytest.raises(UserError, match=r"options\.k = 10, but now options\.k = 5"):
        run_plan(plan(tmp_path / "a", options={"k": 5}, shards=SHARDS), make_shard)
    (made / "go").touch()
    first.join(60)
    assert first.exitcode == 0


def test_a_failure_at_the_first_shard_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEASE, "600")

    def fails(index: int, prefix: Path) -> dict[str, int]:
        make_shard(index, prefix)
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        run_plan(plan(tmp_path / "many/a"), fails)
    assert [*(tmp_path / "many").iterdir()] == []
    run_plan(plan(tmp_path / "many/a", options={"k": 5}), make_shard)
