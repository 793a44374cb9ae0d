"""Claims of shards under clocks that say anything, and in every order of the processes' steps."""

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from log_lines import logged

from megatron_fuse.claiming import LEASE, NO_WAIT
from megatron_fuse.errors import UserError
from megatron_fuse.storage import Plan, completed, run_plan, run_plans
from megatron_fuse.storage.claims import Claims, claims_directory, remove_claims
from megatron_fuse.storage.locks import LockFile, NoLocks

LEASE_SECONDS = 100.0


class Time:
    """The clock of a file system, and processes whose own clocks begin anywhere."""

    def __init__(self) -> None:
        self.now = 1e9

    def touch(self, path: Path, skew: float) -> float:
        os.utime(path, (self.now + skew, self.now + skew))
        return self.now + skew


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Claims]:
    """process(skew=seconds): another process, on a machine that stamps files with a clock of its own."""
    time = Time()

    def make(skew: float = 0) -> Claims:
        claims = Claims(
            tmp_path / ".a.claims",
            LEASE_SECONDS,
            clock=lambda: time.now - 1e9,
            touch=lambda path: time.touch(path, skew),
        )
        claims.announce()
        claims.time = time  # type: ignore[attr-defined]
        return claims

    return make


def test_a_claim_excludes_others_until_it_is_given_back(process: Callable[..., Claims]) -> None:
    first, second = process(), process()
    assert first.take(3) and not second.take(3) and second.is_taken(3)
    assert second.take(4)
    assert not first.release(3)
    assert not second.is_taken(3) and second.take(3)


# 3600: a clock that is an hour fast, on a file system that stamps files by the clocks of its clients
@pytest.mark.parametrize("owner_skew", [0, -3600, 3600])
@pytest.mark.parametrize("watcher_skew", [0, -3600, 3600])
def test_an_owner_that_is_alive_keeps_its_claim_and_a_dead_one_loses_it_after_a_lease(
    process: Callable[..., Claims], owner_skew: float, watcher_skew: float
) -> None:
    owner, watcher = process(owner_skew), process(watcher_skew)
    owner.renew()
    assert owner.take(0)
    for _ in range(50):
        owner.time.now += LEASE_SECONDS / 12
        owner.renew()
        for _ in range(3):
            assert not watcher.take(0)
    waited = 0.0
    while not watcher.take(0):
        owner.time.now += 1
        waited += 1
    agree = owner_skew == watcher_skew
    assert waited == LEASE_SECONDS if agree or owner_skew > watcher_skew else waited >= LEASE_SECONDS / 4
    assert waited <= LEASE_SECONDS
    assert not owner.holds(0) and not owner.commit(0)
    assert watcher.holds(0) and watcher.commit(0)


def test_a_process_that_comes_later_needs_a_quarter_of_the_lease_only(process: Callable[..., Claims]) -> None:
    owner = process()
    assert owner.take(0)
    owner.time.now += 10 * LEASE_SECONDS
    late = process()
    assert not late.take(0)
    owner.time.now += LEASE_SECONDS / 4
    assert late.take(0)


@pytest.mark.parametrize("winner", ["owner", "taker"])
def test_of_publishing_and_taking_over_one_succeeds(
    process: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    """Each of the two is stopped right before its decisive step, until the other has done its own."""
    owner, taker = process(), process()
    assert owner.take(0)
    assert not taker.take(0)
    owner.time.now += 2 * LEASE_SECONDS
    stopped, other = (taker.take, owner.commit) if winner == "owner" else (owner.commit, taker.take)
    link, done = os.link, []

    def stop_before(*paths: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        done.append(other(0))
        link(*paths)

    monkeypatch.setattr(os, "link", stop_before)
    assert not stopped(0)
    assert done == [True]


@pytest.mark.parametrize("makes", ["creation", "takeover"])
def test_of_two_takers_one_succeeds(
    process: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch, makes: str
) -> None:
    first, second = process(), process()
    if makes == "takeover":
        assert process().take(0)
        assert not first.take(0) and not second.take(0)
        first.time.now += 2 * LEASE_SECONDS
    link, done = os.link, []

    def stop_before(*paths: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        done.append(second.take(0))
        link(*paths)

    monkeypatch.setattr(os, "link", stop_before)
    assert not first.take(0)
    assert done == [True] and second.holds(0)


def test_a_link_whose_reply_was_lost_counts(
    process: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims, link = process(), os.link

    def twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)  # as a client of NFS sends a request again

    monkeypatch.setattr(os, "link", twice)
    assert claims.take(0) and claims.commit(0)
    assert claims.release(0)


def test_what_was_claimed_before_the_claims_were_removed_cannot_be_published(
    process: Callable[..., Claims], tmp_path: Path
) -> None:
    late, later = process(), process()
    assert late.take(0)
    remove_claims(tmp_path / "a")
    assert not late.holds(0) and not late.commit(0)
    assert not later.take(0)  # it notices, and begins anew under another name
    assert later.take(0) and later.commit(0)
    assert not late.commit(0)


def test_a_file_system_without_hard_links_is_refused(
    process: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=r"a hard link cannot be made .* or run without --claim"):
        process().take(0)


SHARDS = 3
_STEPS = ("link", "replace", "rename", "unlink", "mkdir", "utime", "rmdir", "scandir")


class Interleaving:
    """Threads as processes: one runs at a time, and at every step on the file system a draw decides which.

    A stopped one runs no further until all others have ended.
    """

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.turn = draw, threading.Condition()
        self.alive: list[int] = []
        self.stopped: list[int] = []
        self.now: int | None = None
        self.errors: list[BaseException] = []
        self.own = threading.local()

    def run(self, works: list[Callable[[], object]]) -> None:
        threads = [threading.Thread(target=self._run, args=item, daemon=True) for item in enumerate(works)]
        self.alive = list(range(len(works)))
        self.now = 0
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "it hangs"
        if self.errors:
            raise self.errors[0]

    def _run(self, number: int, work: Callable[[], object]) -> None:
        self.own.number = number
        try:
            with self.turn:
                self.turn.wait_for(lambda: self.now == number)
            work()
        except BaseException as error:
            self.errors.append(error)
        finally:
            with self.turn:
                self.alive.remove(number)
                self._choose()

    def step(self) -> None:
        number = getattr(self.own, "number", None)
        if number is None:
            return
        with self.turn:
            if self.draw.random() < 0.02 and number not in self.stopped:
                self.stopped.append(number)
            self._choose()
            self.turn.wait_for(lambda: self.now == number)

    def _choose(self) -> None:
        running = [number for number in self.alive if number not in self.stopped]
        if not running:  # the stopped ones go on when the others have ended
            self.stopped.clear()
            running = self.alive
        self.now = self.draw.choice(running) if running else None
        self.turn.notify_all()


@pytest.fixture
def interleaved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Interleaving]]:
    """interleaved(seed): processes whose clocks say anything, on a file system without locks."""

    def make(seed: int) -> Interleaving:
        processes = Interleaving(random.Random(seed))

        def stepping(function: Callable) -> Callable:
            def wrapped(*arguments: object, **options: object) -> object:
                processes.step()
                return function(*arguments, **options)

            return wrapped

        def no_locks(lock: LockFile) -> LockFile:
            raise NoLocks("no locks")

        for name in _STEPS:
            monkeypatch.setattr(os, name, stepping(getattr(os, name)))
        for name in ("open", "exists"):
            monkeypatch.setattr(Path, name, stepping(getattr(Path, name)))
        monkeypatch.setattr(LockFile, "__enter__", no_locks)
        monkeypatch.setattr(Claims, "_keep_alive", lambda claims: None)
        monkeypatch.setattr(Claims, "_is_stale", lambda *_: processes.draw.random() < 0.3)
        monkeypatch.setattr("megatron_fuse.storage.stage.time.sleep", lambda _: processes.step())
        monkeypatch.setenv(LEASE, "1")
        # rmtree by descriptors calls functions that are not patched; by names its steps are others' chances.
        monkeypatch.setattr(shutil, "_use_fd_functions", False)
        return processes

    yield make


def _is_of_one_make(artifact: Path) -> None:
    """Every shard's files are of one make, as its manifest says."""
    for index in range(SHARDS):
        texts = {path.read_text() for path in artifact.glob(f"shard-{index:05d}.*.txt")}
        assert len(texts) == 1, f"shard {index} is of several makes"
    plan = Plan(artifact, "s", {}, {}, SHARDS)
    made = completed(plan)
    assert made is not None
    made.verify()
    names = {path.name for path in artifact.iterdir()}
    assert names == set(made.manifest["files"]) | {
        "plan.json",
        "manifest.json",
        *(f"{name}.done" for name in plan.names()),
    }
    assert not claims_directory(artifact).exists()


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(i, marks=pytest.mark.slow) for i in range(5, 300))]
)
def test_in_any_order_of_steps_a_shard_is_published_once(
    tmp_path: Path, interleaved: Callable[[int], Interleaving], seed: int, plans: int
) -> None:
    """No two makes of a shard are equal, so that a mixture of two would show."""
    makes = iter(range(10**6))
    directories = {name: tmp_path / name for name in "ab"[:plans]}

    def make(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        number = next(makes)
        for prefix in prefixes.values():
            for part in ("x", "y"):
                Path(f"{prefix}.{part}.txt").write_text(f"shard {index}, make {number}")
        return {name: {"rows": 1} for name in prefixes}

    def work() -> None:
        run_plans({name: Plan(place, "s", {}, {}, SHARDS) for name, place in directories.items()}, make)

    processes = interleaved(seed)
    with logged("error"):
        processes.run([work] * 3)
    for directory in directories.values():
        _is_of_one_make(directory)
    # What was made together is of one make.
    texts = [{path.name: path.read_text() for path in place.glob("*.txt")} for place in directories.values()]
    assert all(text == texts[0] for text in texts)


def test_a_process_that_does_not_wait_leaves_the_shards_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEASE, "0.6")
    monkeypatch.setenv(NO_WAIT, "1")
    plan = Plan(tmp_path / "a", "s", {}, {}, 2)
    with Claims(claims_directory(plan.directory), 0.6) as other:
        assert other.take(1)
        with logged() as text:
            assert run_plan(plan, lambda index, prefix: {"rows": index}) is None
    assert "shards that other processes make: 1. This process does not wait for them" in text.getvalue()
    assert [path.name for path in plan.directory.glob("*.done")] == ["shard-00000.done"]
    # One that waits takes it over: the other has given nothing back.
    monkeypatch.delenv(NO_WAIT)
    artifact = run_plan(plan, lambda index, prefix: {"rows": index})
    assert artifact is not None and artifact.counts == {"rows": 1}
