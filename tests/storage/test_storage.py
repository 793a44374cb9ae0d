"""An artifact is whole or resumable, ends with the same bytes however it was interrupted, and refuses
another plan.
"""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from log_lines import at_every_shard

from megatron_fuse.errors import UserError
from megatron_fuse.storage import (
    Plan,
    Shards,
    completed,
    open_artifact,
    remove_abandoned,
    run_plan,
    run_plans,
    shard_bounds,
    temporary_then_rename,
)


def plan(directory: Path, **changes: object) -> Plan:
    content = {"stage": "numbers", "options": {"k": 10}, "inputs": {"parent": "abc"}, "shards": 4} | changes
    return Plan(directory=directory, **content)


def make_shard(index: int, prefix: Path) -> dict[str, int]:
    Path(f"{prefix}.txt").write_text(f"shard {index}\n" * (index + 1))
    return {"lines": index + 1}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_complete_artifact_opens_and_verifies(tmp_path: Path) -> None:
    run_plan(plan(tmp_path / "a"), make_shard)
    artifact = open_artifact(tmp_path / "a", "numbers", "make_numbers")
    artifact.verify()
    assert artifact.counts == {"lines": 10}
    assert [path.name for path in artifact.files(".txt")] == [f"shard-0000{i}.txt" for i in range(4)]


@pytest.mark.parametrize("failing", range(4))
def test_interrupted_anywhere_a_rerun_ends_with_the_same_bytes(tmp_path: Path, failing: int) -> None:
    def fails(index: int, prefix: Path) -> dict[str, int]:
        counts = make_shard(index, prefix)
        if index == failing:
            Path(f"{prefix}.half").write_text("left behind")
            raise KeyboardInterrupt
        return counts

    run_plan(plan(tmp_path / "whole"), make_shard)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan(tmp_path / "broken"), fails)
    with pytest.raises(UserError, match=r"incomplete\. Run make_numbers"):
        open_artifact(tmp_path / "broken", "numbers", "make_numbers")
    made = []
    run_plan(plan(tmp_path / "broken"), lambda i, p: made.append(i) or make_shard(i, p))
    assert made == list(range(failing, 4))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


# 3: ranks with different numbers of shards; 7: ranks without any
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_any_number_of_ranks_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    run_plan(plan(tmp_path / "one"), make_shard)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    results = []
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        results.append(run_plan(plan(tmp_path / "many"), make_shard))
    assert results[-1] is not None
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def make_together(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
    """Shards whose bytes tell who was made with them."""
    for prefix in prefixes.values():
        Path(f"{prefix}.txt").write_text(f"shard {index} of {' '.join(prefixes)}")
    return {name: {"lines": 1} for name in prefixes}


def plans(root: Path, names: str) -> dict[str, Plan]:
    return {name: plan(root / name) for name in names}


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


# After every marker of four shards of two plans.
@pytest.mark.parametrize("cut", range(1, 9))
def test_plans_made_together_end_with_the_same_bytes_wherever_they_were_cut_off(
    tmp_path: Path, cut: int
) -> None:
    lines = []

    def cutting(line: str) -> None:
        lines.append(line)
        if len(lines) == cut:
            raise KeyboardInterrupt

    assert [*run_plans(plans(tmp_path / "whole", "ab"), make_together)] == ["a", "b"]
    with pytest.raises(KeyboardInterrupt), at_every_shard(cutting):
        run_plans(plans(tmp_path / "broken", "ab"), make_together)
    assert [*run_plans(plans(tmp_path / "broken", "ab"), make_together)] == ["a", "b"]
    assert tree(tmp_path / "broken") == tree(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_a_plan_that_joins_later_leaves_whole_shards_of_the_others_alone(
    tmp_path: Path, finished: bool
) -> None:
    made = []

    def make(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        if not (finished or made or index < 2):
            raise KeyboardInterrupt
        return make_together(index, prefixes)

    if finished:
        run_plans(plans(tmp_path, "ab"), make)
    else:
        with pytest.raises(KeyboardInterrupt):
            run_plans(plans(tmp_path, "ab"), make)
    made.append("from here on")
    artifacts = run_plans(plans(tmp_path, "abc"), make)
    company = ["a b", "a b", "a b", "a b"] if finished else ["a b", "a b", "a b c", "a b c"]
    joined = ["c"] * 4 if finished else ["c", "c", "a b c", "a b c"]
    for name, expected in {"a": company, "b": company, "c": joined}.items():
        texts = [path.read_text() for path in artifacts[name].verify().files(".txt")]
        assert texts == [f"shard {index} of {who}" for index, who in enumerate(expected)], name


def test_of_plans_made_together_another_one_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_plan(plan(tmp_path / "b"), make_shard)
    with pytest.raises(UserError, match=r"options\.k = 10, but now options\.k = 5"):
        run_plans({"a": plan(tmp_path / "a"), "b": plan(tmp_path / "b", options={"k": 5})}, make_together)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_leaves_of_plans_made_together_what_is_whole(tmp_path: Path, failing: int) -> None:
    def fails(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        counts = make_together(index, prefixes)
        if index == failing:
            raise UserError("broken")
        return counts

    with pytest.raises(UserError, match="broken"):
        run_plans(plans(tmp_path, "ab"), fails)
    whole = [f"shard-0000{index}" for index in range(failing)]
    left = {f"{shard}.{suffix}" for shard in whole for suffix in ("txt", "done")} | (
        {"plan.json"} if whole else set()
    )
    assert set(tree(tmp_path)) == {f"{name}/{file}" for name in "ab" for file in left}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"k": 5}}, r"options\.k = 10, but now options\.k = 5"),
        ({"inputs": {"parent": "xyz"}}, r"inputs\.parent = 'abc', but now inputs\.parent = 'xyz'"),
        ({"inputs": {"parent": "abc", "other": "d"}}, r"was made without inputs\.other, but now it is 'd'"),
        ({"shards": 5}, r"shards = 4, but now shards = 5"),
        ({"stage": "letters"}, r"stage = 'numbers', but now stage = 'letters'"),
    ],
)
def test_another_plan_is_refused_with_both_values(tmp_path: Path, change: dict, message: str) -> None:
    run_plan(plan(tmp_path), make_shard)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        completed(plan(tmp_path, **change))
    with pytest.raises(UserError, match=message):
        run_plan(plan(tmp_path, **change), make_shard)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"options": {"k": 5}},
            r"options\.k = 10, but now options\.k = 5\. Remove .*/a and run make_numbers again, or restore",
        ),
        (
            {"inputs": {"parent": "f" * 64}},
            r"inputs\.parent = 'abc', but now inputs\.parent = ffffffffffff\.\.\.\. ",
        ),
        ({"inputs": {"other": "d"}}, r"was made without inputs\.other, but now it is 'd'\. "),
        ({"options": {"k": 5}, "remove": Path("all/of/it")}, r"Remove all/of/it and run make_numbers"),
    ],
)
def test_an_artifact_made_otherwise_is_refused_and_keys_not_given_are_not_compared(
    tmp_path: Path, wanted: dict, message: str
) -> None:
    made = run_plan(plan(tmp_path / "a", options={"k": 10, "p": 0.9}), make_shard)
    with pytest.raises(UserError, match=message):
        open_artifact(tmp_path / "a", "numbers", "make_numbers", **wanted)
    opened = open_artifact(
        tmp_path / "a", "numbers", "make_numbers", options={"k": 10}, inputs={"parent": "abc"}
    )
    assert opened == made


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:]], ids=["truncated", "bit flip"]
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    artifact = run_plan(plan(tmp_path), make_shard)
    assert artifact is not None
    paths = artifact.files(".txt")
    paths[2].write_bytes(damage(paths[2].read_bytes()))
    with pytest.raises(UserError, match=r"shard-00002\.txt"):
        artifact.verify()
    shards = Shards(artifact, paths, Path.read_text)
    assert (len(shards), shards[1], shards[-1]) == (4, "shard 1\n" * 2, "shard 3\n" * 4)
    with pytest.raises(
        UserError, match=r"shard-00002\.txt: .*(the manifest has|instead of).*run the stage again"
    ):
        list(shards)


def test_a_killed_process_s_temporary_files_go_and_a_living_one_s_stay(tmp_path: Path) -> None:
    writing = f"""
import os, signal
from pathlib import Path
from megatron_fuse.storage import temporary_then_rename
with temporary_then_rename(Path({str(tmp_path / "mine")!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", writing]).returncode == -signal.SIGKILL
    assert [path.read_text() for path in tmp_path.iterdir()] == ["half"]
    with temporary_then_rename(tmp_path / "mine") as temporary:
        temporary.write_text("whole")
        remove_abandoned(tmp_path)
    assert contents(tmp_path) == {"mine": b"whole"}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), temporary_then_rename(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    ("items", "size", "bounds"), [(0, 4, [0, 0]), (3, 4, [0, 3]), (4, 4, [0, 4]), (9, 4, [0, 4, 8, 9])]
)
def test_shards_partition_the_items(items: int, size: int, bounds: list[int]) -> None:
    assert shard_bounds(items, size).tolist() == bounds
