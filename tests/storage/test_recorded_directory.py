"""A directory with a record of its files appears whole, is replaced whole, and loses nothing that is the
user's.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_fuse.errors import UserError
from megatron_fuse.storage.recorded_directory import (
    directory_then_rename,
    find,
    record_files,
    sole_writer,
)

RECORD = "made.json"


def make(output: Path, origin: str, size: int = 4) -> bool:
    """As exports and merges do it; whether something was written."""
    with sole_writer(output, RECORD):
        found = find(output, RECORD, "--output")
        if found and found.whole and found.origin == {"from": origin}:
            return False
        if found:
            found.refuse_changes("--output")
        with directory_then_rename(output, found) as new:
            (new / "inner").mkdir()
            for name in ("a", "inner/b"):
                (new / name).write_bytes(origin.encode() * size)
            record_files(new, RECORD, {"from": origin})
    return True


@pytest.fixture
def output(tmp_path: Path) -> Path:
    make(tmp_path / "place/out", "first")
    return tmp_path / "place/out"


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        work()
    assert len(str(refused.value)) <= 600
    return str(refused.value)


def neighbours(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def test_what_is_whole_is_left_alone(output: Path) -> None:
    assert not make(output, "first") and neighbours(output) == ["out"]
    (output / "mine.txt").write_text("notes")  # beside an export that is not to be replaced
    assert not make(output, "first") and (output / "mine.txt").read_text() == "notes"


def test_what_is_gone_is_made_again(output: Path) -> None:
    for name in ("a", "inner/b"):
        (output / name).unlink()
        assert make(output, "first")
        assert (output / name).read_text() == "first" * 4 and neighbours(output) == ["out"]


@pytest.mark.parametrize("origin", ["first", "second"])
@pytest.mark.parametrize("content", [b"", b"first", b"First" * 4], ids=["emptied", "cut off", "one bit"])
def test_what_was_changed_is_named_and_kept(output: Path, origin: str, content: bytes) -> None:
    (output / "inner/b").write_bytes(content)
    message = refusal(lambda: make(output, origin))
    assert f"{output}/inner/b: " in message and "--output" in message
    assert (
        (output / "inner/b").read_bytes() == content
        and (output / "a").exists()
        and neighbours(output) == ["out"]
    )


@pytest.mark.parametrize("name", ["mine.txt", "inner/mine", ".hidden", "link"])
def test_a_file_of_the_user_is_named_before_anything_is_replaced(output: Path, name: str) -> None:
    (output / name).symlink_to("nowhere") if name == "link" else (output / name).write_text("notes")
    assert name in refusal(lambda: make(output, "second"))
    assert os.path.lexists(output / name) and (output / "a").read_text() == "first" * 4


def test_an_older_output_is_replaced_once_the_new_one_is_whole(output: Path) -> None:
    with sole_writer(output, RECORD), directory_then_rename(output, find(output, RECORD, "--output")) as new:
        (new / "c").write_text("new")
        record_files(new, RECORD, {"from": "second"})
        assert (output / "a").read_text() == "first" * 4
    assert sorted(path.name for path in output.iterdir()) == ["c", RECORD] and neighbours(output) == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("a bug"), KeyboardInterrupt()], ids=type
)
def test_what_breaks_off_leaves_the_older_output(output: Path, error: BaseException) -> None:
    def broken() -> None:
        with (
            sole_writer(output, RECORD),
            directory_then_rename(output, find(output, RECORD, "--output")) as new,
        ):
            (new / "a").write_text("half")
            raise error

    with pytest.raises((UserError, ValueError, KeyboardInterrupt)) as raised:
        broken()
    if isinstance(error, OSError):
        assert f"{output}: cannot be written (No space left on device)" in str(raised.value)
    assert (output / "a").read_text() == "first" * 4 and neighbours(output) == ["out"]


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"from": "first"}', '{"files": 5}', '{"files": {"a": {"bytes": "x"}}}']
)
def test_a_damaged_record_is_named_and_nothing_removed(output: Path, content: str) -> None:
    (output / RECORD).write_text(content)
    assert RECORD in refusal(lambda: make(output, "second"))
    assert (output / "a").exists() and (output / "inner/b").exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("thesis", "file"):
        assert f"has no {RECORD}" in refusal(lambda name=name: make(tmp_path / name, "first"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a forked process that does the work: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# A replacement makes two renames, and removes four files and two directories of the old output.
@pytest.mark.parametrize("calls", range(9))
def test_a_kill_at_any_rename_or_removal_loses_nothing(
    output: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    def killed() -> None:
        left = calls

        def counted(real: Callable) -> Callable:
            def call(path: Path, *arguments: object, **keywords: object) -> object:
                nonlocal left
                if ".old" in f"{path}{arguments}" or ".new" in path.name:
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                return real(path, *arguments, **keywords)

            return call

        for name in ("rename", "unlink", "rmdir"):
            setattr(Path, name, counted(getattr(Path, name)))
        make(output, "second")

    status = in_child(killed)
    assert status == (-signal.SIGKILL if calls < 7 else 0), calls
    visible = (output / "a").read_text() if output.exists() else None
    assert visible in (None, "first" * 4, "second" * 4)
    with sole_writer(output, RECORD):  # sweeps
        assert (output / "a").read_text() == (visible or "first" * 4)
        assert find(output, RECORD, "--output").whole  # type: ignore[union-attr]
    assert neighbours(output) == ["out"]
    make(output, "second")
    assert (output / "a").read_text() == "second" * 4 and neighbours(output) == ["out"]


def test_a_killed_write_is_swept_and_a_users_file_in_what_was_replaced_is_not(output: Path) -> None:
    def killed() -> None:
        with sole_writer(output, RECORD), directory_then_rename(output.with_name("other")) as new:
            (new / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    old = output.with_name(".out.0123abcd.old")
    make(old, "older")
    (old / "mine").write_text("came late")
    (output.with_name(".out.notours.old")).mkdir()
    make(output, "second")
    make(output.with_name("other"), "second")
    assert neighbours(output) == [".out.0123abcd.old", ".out.notours.old", "other", "out"]
    assert [path.name for path in old.iterdir()] == ["mine"]


def test_of_processes_at_once_one_writes_and_the_others_find_it_done(tmp_path: Path) -> None:
    for round_ in range(5):
        output = tmp_path / str(round_) / "out"
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                try:
                    os._exit(10 + make(output, "first", size=50_000))
                except BaseException:
                    os._exit(1)
            children.append(child)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [10, 10, 10, 11] and neighbours(output) == ["out"]


def mounted(directory: Path, options: str) -> None:
    directory.mkdir(exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a file system needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted(tmp_path / "disk", "size=256k")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_full_and_a_read_only_disk_are_named(small_disk: Path) -> None:
    output = small_disk / "out"
    assert make(output, "first")
    message = refusal(lambda: make(output, "second", size=100_000))
    assert f"{output}: cannot be written (No space left on device)" in message and "MB are free" in message
    assert (output / "a").read_text() == "first" * 4 and neighbours(output) == ["out"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in refusal(lambda: make(output, "second"))
    assert (output / "a").read_text() == "first" * 4


def test_files_and_directories_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "out", "first")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()} == {"0o640"}
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_dir()} == {"0o750"}
