"""The kinds of fault. Each draws one from a seed, does it to a target, checks the law, and says what came of
it.

The law: every process ends with exit code 0 or 2 (killed ones aside) and without a traceback; who worked
alone and ended with 0 has left a whole artifact; a rerun ends with 0; the artifact equals the undisturbed one
byte for byte, without any other file; no other file has changed.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from damage import damage_and_rerun
from jobs import Running, Watch
from targets import Broken, Target, require_good_end, require_rerun, require_whole

_STUCK_AFTER = 0.5  # seconds without an operation of the others, after which a stopped process goes on
_PAGE = 4096  # bytes: a tmpfs stores files in whole pages
_LAUNCHER_WAITS = 2.0  # seconds after a rank was killed, until its launcher ends the others

Facts = dict[str, Any]


@dataclass
class Member:
    """One of the processes of a race. rank: (RANK, WORLD_SIZE), None: alone."""

    watch: Watch = field(default_factory=Watch)
    rank: tuple[int, int] | None = None
    more: Mapping[str, str] = field(default_factory=dict)  # of its environment

    def environment(self) -> dict[str, str]:
        ranks = dict(zip(("RANK", "WORLD_SIZE"), map(str, self.rank), strict=True)) if self.rank else {}
        return {**self.more, **ranks}


def killed(target: Target, draw: random.Random) -> Facts:
    """kill -9 at a drawn operation or time, sometimes twice, before the artifact is whole."""
    codes = []
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.7:
            job = target.run(Watch(kill_at=draw.randint(1, target.operations), half=draw.random() < 0.5))
        else:
            job = _killed_after(target, draw.uniform(0, 1.1 * target.seconds))
        require_good_end(job, may_be_killed=True)
        codes.append(job.exit_code)
    require_rerun(target)
    return {"codes": codes, "outcome": "killed" if -9 in codes else "ended before"}


def _killed_after(target: Target, seconds: float) -> Running:
    target.clear_counts()
    job, end = target.start(), time.monotonic() + seconds

    def kill() -> None:
        if time.monotonic() > end:
            job.send(signal.SIGKILL)

    target.wait_for([job], kill)
    return job


def interrupted(target: Target, draw: random.Random) -> Facts:
    """Ctrl-C or SIGTERM at a drawn operation: a quiet end, after which no temporary file is left."""
    number = draw.choice((signal.SIGINT, signal.SIGTERM))
    job = target.run(Watch(kill_at=draw.randint(1, target.operations), number=number))
    if job.exit_code not in (0, 128 + number) or "Traceback" in job.text:
        raise Broken(f"exit code {job.exit_code} after {number.name}: {job.text.strip()[-700:]}")
    if left := [path.name for path in target.directory.rglob(".*.tmp*")]:
        raise Broken(f"left after {number.name}: {left}")
    require_rerun(target)
    return {"codes": [job.exit_code], "outcome": "interrupted" if job.exit_code else "ended before"}


def raced(target: Target, draw: random.Random) -> Facts:
    """Two to six processes at once."""
    return _race(target, _members(target, draw, draw.randint(2, 6)))


def raced_by_four(target: Target, draw: random.Random) -> Facts:
    return _race(target, _members(target, draw, 4))


def stopped(target: Target, draw: random.Random) -> Facts:
    """One of several processes is stopped at a drawn operation, and goes on when the others have ended or
    wait.
    """
    members = _members(target, draw, draw.randint(2, 4))
    one = draw.choice(members)
    one.watch = replace(one.watch, stop_at=draw.randint(1, _share(target, one)))
    return _race(target, members)


def killed_in_race(target: Target, draw: random.Random) -> Facts:
    """One of several processes is killed at a drawn operation."""
    members = _members(target, draw, draw.randint(2, 4))
    one = draw.choice(members)
    one.watch = replace(one.watch, kill_at=draw.randint(1, _share(target, one)), half=draw.random() < 0.5)
    return _race(target, members)


def _share(target: Target, member: Member) -> int:
    """Operations that a process comes to in a race, roughly: most of what it would come to alone."""
    return max(1, target.operations // (member.rank[1] if member.rank else 1))


def _members(target: Target, draw: random.Random, processes: int) -> list[Member]:
    """Independent ones, a launcher's set, a set of which one rank is there twice, or a set beside one on
    its own.
    """
    layout = draw.choice(
        ("independent", "independent", "set", "twice", "beside") if target.ranked else ("independent",)
    )
    if layout == "twice" and processes > 2:
        ranks = [
            *((rank, processes - 1) for rank in range(processes - 1)),
            (draw.randrange(processes - 1), processes - 1),
        ]
    elif layout == "beside" and processes > 2:
        ranks = [*((rank, processes - 1) for rank in range(processes - 1)), None]
    elif layout == "twice":
        ranks = [(0, 1)] * processes
    else:
        ranks = [(rank, processes) if layout == "set" else None for rank in range(processes)]
    environments = target.environments
    members = [
        Member(rank=rank, more=draw.choice(environments) if len(environments) > 1 else environments[0])
        for rank in ranks
    ]
    for place, member in enumerate(members):
        how = draw.random()
        if place and how < 0.4:  # at a moment of the first one's work
            member.watch = Watch(after=(0, draw.randint(1, target.operations)))
        elif how < 0.7:
            member.watch = Watch(delay=draw.uniform(0, target.seconds))
    return members


def _race(target: Target, members: list[Member]) -> Facts:
    target.clear_counts()
    jobs = [target.start(member.watch, member.environment(), place) for place, member in enumerate(members)]
    aside: set[int] = set()  # pids of the ranks whose launcher has ended them, as another one was killed
    # By pid of those that worked alone and ended with 0: what was not whole by then.
    finished: dict[int, list[str]] = {}
    seen: list[int] = []
    since = killed_since = time.monotonic()

    def meanwhile() -> None:
        nonlocal seen, since, killed_since
        now = time.monotonic()
        for member, job in zip(members, jobs, strict=True):
            if job.exit_code == 0 and not member.rank and job.pid not in finished:
                # The others may still have temporary files.
                finished[job.pid] = [line for line in target.differences() if not line.endswith("left over")]
        counts = target.counts
        moving = [counts[job.job.place] for job in jobs if not job.is_stopped]
        if moving != seen:
            seen, since = moving, now
        others_ended = all(job.exit_code is not None for job in jobs if not job.is_stopped)
        for job in jobs:
            if job.is_stopped and (others_ended or now - since > _STUCK_AFTER):
                job.send(signal.SIGCONT)
        if not any(job.exit_code == -9 for job in jobs):
            killed_since = now
        lost = [m.rank[1] for m, job in zip(members, jobs, strict=True) if m.rank and job.exit_code == -9]
        if lost and now - killed_since > _LAUNCHER_WAITS:
            for member, job in zip(members, jobs, strict=True):
                if member.rank and not job.poll():
                    aside.add(job.pid)
                    job.send(signal.SIGKILL)

    target.wait_for(jobs, meanwhile)
    for member, job in zip(members, jobs, strict=True):
        require_good_end(job, may_be_killed=bool(member.watch.kill_at) or job.pid in aside)
        if job.exit_code == 2 and "another process" not in job.text:
            raise Broken(f"exit code 2, and no other process is named: {job.text.strip()[-500:]}")
        if job.exit_code == 0 and not member.rank:
            if early := finished.get(job.pid):
                raise Broken(f"a process that worked alone has ended with 0 too early: {early[0]}")
            require_whole(target, "a process that worked alone has ended with 0")
    at_once = not target.differences()
    require_rerun(target)
    return {
        "codes": [job.exit_code for job in jobs],
        "ranks": [member.rank for member in members],
        "outcome": "whole at once" if at_once else "whole after the rerun",
    }


def full(target: Target, draw: random.Random) -> Facts:
    """A file system that is full before the artifact is whole; more room comes before the rerun."""
    with _small_file_system(target, draw) as make_room:
        return _refused_then_rerun(target, Watch(), make_room, {"how": "tmpfs"})


def file_size(target: Target, draw: random.Random) -> Facts:
    """A largest size of files, as `ulimit -f` sets it."""
    limit = draw.randint(1, max(map(len, target.undisturbed.values())))
    return _refused_then_rerun(target, Watch(file_size=limit), lambda: None, {"how": f"{limit} bytes"})


def read_only(target: Target, draw: random.Random) -> Facts:
    """One directory of the artifact's without the right to write, sometimes after a kill."""
    if draw.random() < 0.6:
        target.run(Watch(kill_at=draw.randint(1, target.operations)))
    directories = [target.directory, *(path for path in target.directory.rglob("[!.]*") if path.is_dir())]
    directory = draw.choice(sorted(directories))
    directory.chmod(0o555)

    def fix() -> None:
        with suppress(FileNotFoundError):  # what a killed process had left, by now removed
            directory.chmod(0o755)

    try:
        return _refused_then_rerun(target, Watch(plain_user=True), fix, {"how": directory.name})
    finally:
        fix()


def _refused_then_rerun(target: Target, watch: Watch, fix: Callable[[], object], facts: Facts) -> Facts:
    job = target.run(watch)
    require_good_end(job, may_be_silent=bool(watch.file_size))
    if job.exit_code == 0:
        require_whole(target, "a process has ended with 0")
    fix()
    require_rerun(target)
    return {**facts, "codes": [job.exit_code], "outcome": "refused" if job.exit_code else "not in the way"}


@contextmanager
def _small_file_system(target: Target, draw: random.Random) -> Iterator[Callable[[], object]]:
    """Everything under `under` moves to a tmpfs that has room for a drawn part of the artifact.

    Yields what makes it large.
    """

    inputs = target.scratch / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    shutil.copytree(target.under, inputs)
    written = sum(-(-len(content) // _PAGE) for content in target.undisturbed.values())
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", target.under], check=True)
    try:
        shutil.copytree(inputs, target.under, dirs_exist_ok=True)
        there = os.statvfs(target.under)
        room = draw.randint(0, written) + (there.f_blocks - there.f_bfree) * there.f_frsize // _PAGE
        _resize(target.under, f"{_PAGE * max(room, 1)}")
        yield lambda: _resize(target.under, "64m")
    finally:
        subprocess.run(["umount", "--lazy", target.under], check=True)


def _resize(directory: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", directory], check=True)


def may_mount(directory: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    if os.geteuid():
        return False
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", directory], check=True, capture_output=True
        )
        subprocess.run(["umount", directory], check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


KINDS: dict[str, Callable[[Target, random.Random], Facts]] = {
    "killed": killed,
    "raced": raced,
    "raced by four": raced_by_four,
    "stopped": stopped,
    "killed in a race": killed_in_race,
    "full": full,
    "file size": file_size,
    "read-only": read_only,
    "damaged": damage_and_rerun,
    "interrupted": interrupted,
}


def run_case(kind: str, target: Target, seed: str) -> Facts:
    """One case: what was drawn and what came of it; `problem` says how the law was broken, or is None."""
    draw = random.Random(f"{kind} {target.name} {seed}")
    begin, facts, problem = time.monotonic(), {}, None
    target.locks_may_stay = kind in ("killed", "killed in a race", "read-only", "damaged", "interrupted")
    target.forget()
    around = target.surroundings()
    try:
        facts = KINDS[kind](target, draw)
        if target.surroundings() != around:
            changed = sorted(set(around.items()) ^ set(target.surroundings().items()))
            raise Broken(f"another file has changed: {changed[0][0]}")
    except Broken as broken:
        problem = str(broken)
    finally:
        target.restore()
    seconds = round(time.monotonic() - begin, 3)
    return {
        "kind": kind,
        "target": target.name,
        "seed": seed,
        "seconds": seconds,
        "problem": problem,
        **facts,
    }
