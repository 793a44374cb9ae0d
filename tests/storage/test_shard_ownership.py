"""Several processes of one stage at once: each shard has one owner, and damaged shards alone are made
again.
"""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from log_lines import logged

from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.storage import LockFile, Plan, completed, read_sealed, run_plan, run_plans, write_sealed

FORK = multiprocessing.get_context("fork")
SHARDS = 4


def plan(directory: Path, **changes: object) -> Plan:
    content = {
        "stage": "numbers",
        "options": {"k": 10},
        "inputs": {"parent": "abc"},
        "shards": SHARDS,
    } | changes
    return Plan(directory=directory, **content)


def make_shard(index: int, prefix: Path) -> dict[str, int]:
    for suffix in ("txt", "second.txt"):
        Path(f"{prefix}.{suffix}").write_text(f"shard {index}\n" * (index + 1))
    return {"lines": index + 1}


def contents(root: Path) -> dict[str, bytes]:
    """Every file under a directory, hidden ones too."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    run_plan(plan(tmp_path / "whole/a"), make_shard)
    return contents(tmp_path / "whole")


def start(work: Callable[[], object]) -> BaseProcess:
    """A process that ends as a command would, with exit code 2 for a UserError and 1 for a traceback."""
    process = FORK.Process(target=lambda: os._exit(exit_code(lambda: work() and None)))
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "not in 30 s"
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_the_same_share_make_every_shard_once(
    tmp_path: Path, whole: dict[str, bytes], processes: int
) -> None:
    made = tmp_path / "made"
    made.mkdir()

    def make(index: int, prefix: Path) -> dict[str, int]:
        (made / f"{index}-{os.getpid()}").touch()
        time.sleep(0.02)
        return make_shard(index, prefix)

    racing = [start(lambda: run_plan(plan(tmp_path / "race/a"), make)) for _ in range(processes)]
    for process in racing:
        process.join(60)
    assert [process.exitcode for process in racing] == [0] * processes
    assert contents(tmp_path / "race") == whole
    assert sorted(path.name.split("-")[0] for path in made.iterdir()) == [
        str(index) for index in range(SHARDS)
    ]


def test_a_shard_of_a_killed_process_is_taken_over_and_one_of_a_stopped_process_awaited(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    begun = tmp_path / "begun"

    def hang(index: int, prefix: Path) -> dict[str, int]:
        make_shard(index, prefix)
        if index == 1:
            begun.touch()
            time.sleep(60)
        return {"lines": index + 1}

    owner = start(lambda: run_plan(plan(tmp_path / "race/a"), hang))
    wait_for(begun.exists)
    os.kill(owner.pid, signal.SIGSTOP)

    def join() -> None:
        logger = logging.getLogger("megatron_fuse")
        logger.addHandler(logging.FileHandler(tmp_path / "log"))
        logger.setLevel(logging.INFO)
        run_plan(plan(tmp_path / "race/a"), make_shard)

    second = FORK.Process(target=join)
    second.start()
    # All others are made; then it waits, and says for whom.
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and f"which process {owner.pid} on " in log.read_text())
    assert sorted(path.name for path in (tmp_path / "race/a").glob("*.done")) == [
        f"shard-0000{index}.done" for index in (0, 2, 3)
    ]
    assert second.is_alive()
    os.kill(owner.pid, signal.SIGKILL)
    second.join(60)
    owner.join(60)
    assert second.exitcode == 0
    assert contents(tmp_path / "race") == whole
    with logged("warning") as text:
        assert run_plan(plan(tmp_path / "race/a"), make_shard) is not None
    assert text.getvalue() == ""


def test_another_plan_beside_a_running_one_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    begun, end = tmp_path / "begun", tmp_path / "end"

    def wait(index: int, prefix: Path) -> dict[str, int]:
        begun.touch()
        wait_for(end.exists)
        return make_shard(index, prefix)

    first = start(lambda: run_plan(plan(tmp_path / "a"), wait))
    wait_for(begun.exists)
    with pytest.raises(UserError, match=r"options\.k = 10, but now options\.k = 5"):
        run_plan(plan(tmp_path / "a", options={"k": 5}), make_shard)

    def fails(index: int, prefix: Path) -> dict[str, int]:
        raise UserError("broken")

    # It fails at its first shard while no shard is whole: the plan is also the other process's.
    with pytest.raises(UserError, match="broken"):
        run_plan(plan(tmp_path / "a"), fails)
    assert (tmp_path / "a/plan.json").exists()
    end.touch()
    first.join(60)
    assert first.exitcode == 0
    assert completed(plan(tmp_path / "a")) is not None


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("name", ["shard-00002.txt", "shard-00002.second.txt", "shard-00002.done"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_of_damaged_files_only_the_shard_is_made_again(
    tmp_path: Path, whole: dict[str, bytes], damage: str, name: str, finished: bool
) -> None:
    directory = tmp_path / "whole/a"
    if not finished:
        (directory / "manifest.json").unlink()
    DAMAGES[damage](directory / name)
    made: list[int] = []
    with logged() as text:
        run_plan(plan(directory), lambda index, prefix: made.append(index) or make_shard(index, prefix))
    lines = [line for line in text.getvalue().splitlines() if "made again" in line]
    # A finished artifact is what its manifest says: it does without markers.
    assert made == ([] if finished and name.endswith(".done") else [2])
    if made and (directory / name).suffix != ".done":
        assert len(lines) == 1 and f"{directory / name}: " in lines[0]
        assert lines[0].endswith("shard 2 is made again")
    assert contents(tmp_path / "whole") == {
        **whole,
        **({} if made else {f"a/{name}": contents(directory).get(name)}),
    } or (not made)


@pytest.mark.parametrize("damage", [*DAMAGES, "edited"])
def test_a_damaged_manifest_is_written_again_from_the_markers(
    tmp_path: Path, whole: dict[str, bytes], damage: str
) -> None:
    path = tmp_path / "whole/a/manifest.json"
    edit = {
        **DAMAGES,
        "edited": lambda path: path.write_text(path.read_text().replace('"lines": 10', '"lines": 11')),
    }
    edit[damage](path)
    run_plan(plan(tmp_path / "whole/a"), pytest.fail)
    assert contents(tmp_path / "whole") == whole


def test_markers_of_other_shards_are_not_believed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run_plan(plan(tmp_path / "swapped/a"), make_shard)
    first, second = (tmp_path / f"swapped/a/shard-0000{index}.done" for index in (1, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    (tmp_path / "swapped/a/manifest.json").unlink()
    run_plan(plan(tmp_path / "swapped/a"), make_shard)
    assert contents(tmp_path / "swapped") == whole


def test_shards_of_another_plan_are_refused_though_plan_json_is_gone(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for name in ("plan.json", "manifest.json"):
        (tmp_path / "whole/a" / name).unlink()
    with pytest.raises(UserError, match=r"shard-00000\.done belongs to a shard with other options"):
        run_plan(plan(tmp_path / "whole/a", options={"k": 5}), make_shard)
    assert {name for name in whole if "shard" in name} <= set(contents(tmp_path / "whole"))


def test_files_that_are_not_the_stage_s_stay(tmp_path: Path, whole: dict[str, bytes]) -> None:
    directory = tmp_path / "whole/a"
    (directory / "notes.txt").write_text("mine")
    (directory / "shard-00002.txt").unlink()
    run_plan(plan(directory), make_shard)
    assert contents(tmp_path / "whole") == {**whole, "a/notes.txt": b"mine"}


def test_plans_made_together_race_without_a_deadlock(tmp_path: Path) -> None:
    def together(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        time.sleep(0.01)
        return {name: make_shard(index, prefix) for name, prefix in prefixes.items()}

    orders = ["ab", "ba", "bc", "ac"]
    racing = [
        start(lambda names=names: run_plans({name: plan(tmp_path / name) for name in names}, together))
        for names in orders
    ]
    for process in racing:
        process.join(60)
    assert [process.exitcode for process in racing] == [0] * len(orders)
    for name in "abc":
        artifact = completed(plan(tmp_path / name))
        assert artifact is not None
        artifact.verify()


def test_a_forked_child_does_not_keep_its_parent_s_locks(tmp_path: Path) -> None:
    def hold() -> None:
        with LockFile(tmp_path / "lock") as locks:
            assert locks.try_lock(1)
            child = os.fork()
            if child == 0:
                time.sleep(60)
            (tmp_path / "child").write_text(str(child))
            time.sleep(60)

    parent = start(hold)
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
    with LockFile(tmp_path / "lock") as locks:
        assert not locks.try_lock(1)
        assert locks.owner(1).startswith(f"process {parent.pid} on ")
        assert locks.try_lock(2)
        assert not locks.try_alone()
        parent.kill()
        parent.join()
        assert locks.try_lock(1)
        assert locks.try_alone()
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_of_two_processes_that_end_at_once_one_removes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each still sees the other at its first look, and has gone by its second."""
    first_look = iter([False])
    try_alone = LockFile.try_alone
    monkeypatch.setattr(LockFile, "try_alone", lambda lock: next(first_look, True) and try_alone(lock))
    with LockFile(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


def test_the_last_of_many_processes_removes_the_lock(tmp_path: Path) -> None:
    def use() -> None:
        for _ in range(200):
            with LockFile(tmp_path / "lock") as locks:
                locks.try_lock(1)

    users = [start(use) for _ in range(4)]
    for user in users:
        user.join(60)
    assert [user.exitcode for user in users] == [0] * 4
    assert not (tmp_path / "lock").exists()


def test_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / "record.json", {"a": 1, "b": {"é": [1.5, None]}})
    assert read_sealed(tmp_path / "record.json") == {"a": 1, "b": {"é": [1.5, None]}}
    text = (tmp_path / "record.json").read_text()
    (tmp_path / "record.json").write_text(text.replace("1.5", "2.5"))
    with pytest.raises(UserError, match=r"record\.json: the content does not have the sha256"):
        read_sealed(tmp_path / "record.json")
