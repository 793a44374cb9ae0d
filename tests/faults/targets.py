"""What faults are done to: a command, the directory that it writes, and what it writes undisturbed."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jobs import ENDED, Job, Running, Server, Watch, end_all

HANGS_AFTER = 120.0  # seconds without an operation of any job
_PLACES = 16  # the most jobs at the same time
_FOREIGN = "notes.txt"  # a file that the user put there

Files = dict[str, bytes]


class Broken(AssertionError):
    """The law does not hold after a fault."""


T = TypeVar("T")


def _read_those_there(paths: Iterable[Path], read: Callable[[Path], T]) -> dict[Path, T]:
    """Without files that a process removes meanwhile, as the last one does with its lock file."""
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):
            found[path] = read(path)
    return found


def _all_files(directory: Path) -> list[Path]:
    """Unlike Path.rglob, os.walk passes over directories that a process removes meanwhile."""
    return [Path(place, name) for place, _, names in os.walk(directory) for name in names]


@dataclass
class Target:
    """directory: what the command writes, below `under`, where nothing else may change. reader: what reads it
    later.

    normal: (file, bytes) -> the bytes that have to be equal; files that it returns None for may differ or be
    missing. undisturbed, operations, seconds: of a run that nothing disturbs.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    directory: Path
    under: Path
    scratch: Path  # for counts and outputs
    server: Server
    ranked: bool = True  # several processes may share the work by RANK and WORLD_SIZE
    reader: "Target | None" = None
    normal: Callable[[str, bytes], bytes | None] = lambda _, content: content
    # A process that is killed at its very end leaves a lock that nobody holds or needs.
    locks_may_stay: bool = False
    # Of single processes; of several, each draws one. The first is that of the undisturbed run.
    environments: Sequence[Mapping[str, str]] = ({},)
    undisturbed: Files = field(default_factory=dict)
    operations: int = 0
    seconds: float = 0

    def __post_init__(self) -> None:
        self.clear_counts()

    def learn(self) -> "Target":
        """Runs it undisturbed; its files stay."""
        begin = time.monotonic()
        job = self.run()
        self.seconds, self.operations = time.monotonic() - begin, self.counts[0] % ENDED
        if job.exit_code:
            raise Broken(f"{self.name} ends with {job.exit_code} undisturbed: {job.text}")
        self.undisturbed = self.files()
        return self

    def start(
        self, watch: Watch | None = None, environment: Mapping[str, str] | None = None, place: int = 0
    ) -> Running:
        output = self.scratch / f"output-{place}.txt"
        output.unlink(missing_ok=True)
        return self.server.start(
            Job(
                self.function,
                self.arguments,
                output=output,
                counts=self.scratch / "counts.bin",
                environment=self.environments[0] if environment is None else environment,
                watch=replace(watch or Watch(), under=self.under),
                place=place,
            )
        )

    def run(self, watch: Watch | None = None) -> Running:
        """One process, to its end."""
        self.clear_counts()
        job = self.start(watch)
        self.wait_for([job])
        return job

    def wait_for(self, jobs: Sequence[Running], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until all have ended; `meanwhile` is called in between.

        Raises Broken where none of them gets on.
        """
        seen, since = [], time.monotonic()
        while True:
            ended = [job.poll() for job in jobs]
            if all(ended):
                return
            meanwhile()
            time.sleep(0.003)
            now = [*self.counts, *((job.exit_code, job.is_stopped) for job in jobs)]
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > HANGS_AFTER:
                running = [job for job in jobs if job.exit_code is None]
                said = running[0].text[-300:]
                end_all(jobs)
                raise Broken(f"{len(running)} of {len(jobs)} processes hang; one said: {said}")

    def clear_counts(self) -> None:
        (self.scratch / "counts.bin").write_bytes(bytes(8 * _PLACES))

    @property
    def counts(self) -> list[int]:
        """Operations of the jobs that run, or ran last, by their place."""
        return np.fromfile(self.scratch / "counts.bin", np.int64).tolist()

    def _counts(self, path: Path) -> bool:
        is_lock = (path.name.startswith(".") and path.suffix == ".lock") or ".claims" in path.parent.name
        return path.is_file() and path.name != _FOREIGN and not (is_lock and self.locks_may_stay)

    def files(self) -> Files:
        paths = sorted(path for path in _all_files(self.directory) if self._counts(path))
        found = _read_those_there(paths, Path.read_bytes)
        return {str(path.relative_to(self.directory)): content for path, content in found.items()}

    def forget(self) -> None:
        """Removes what the command wrote; a file of the user's lies there instead."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.with_name(f".{self.directory.name}.lock").unlink(missing_ok=True)
        for claims in self.directory.parent.glob(f".{self.directory.name}.claims*"):
            shutil.rmtree(claims)
        self.directory.mkdir(parents=True)
        (self.directory / _FOREIGN).write_text("not yours")

    def restore(self) -> None:
        """The undisturbed files and no other."""
        self.forget()
        for name, content in self.undisturbed.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def differences(self) -> list[str]:
        """How the files differ from the undisturbed ones, in words."""
        found, wanted = self.files(), self.undisturbed
        lines = []
        for name in sorted(found.keys() | wanted.keys()):
            have, want = (
                self.normal(name, files[name]) if name in files else None for files in (found, wanted)
            )
            if have != want:
                state = "missing" if name not in found else "left over" if name not in wanted else "different"
                lines.append(f"{name} is {state}")
        if not (self.directory / _FOREIGN).exists():
            lines.append(f"the user's {_FOREIGN} is deleted")
        return lines

    def surroundings(self) -> dict[str, tuple[int, int]]:
        """(size, time of the last change) of all other files under `under`."""
        written = {self.directory, *([self.reader.directory] if self.reader else [])}
        paths = [
            path for path in _all_files(self.under) if self._counts(path) and not written & set(path.parents)
        ]
        found = _read_those_there(paths, Path.stat)
        return {str(path): (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def require_good_end(job: Running, *, may_be_killed: bool = False, may_be_silent: bool = False) -> None:
    """Raises Broken unless a process has ended with 0, or with 2 and a message; silent where its output
    has no room either.
    """
    if may_be_killed and job.exit_code == -9:
        return
    if "Traceback" in job.text or job.exit_code not in (0, 2):
        raise Broken(f"exit code {job.exit_code}: {job.text.strip()[-700:]}")
    if job.exit_code == 2 and "error: " not in job.text and not may_be_silent:
        raise Broken(f"exit code 2 without a message: {job.text.strip()[-300:]}")


def require_whole(target: Target, when: str) -> None:
    if differences := target.differences():
        shown = "; ".join(differences[:4]) + (
            f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        )
        raise Broken(f"{when}: {shown}")


def require_rerun(target: Target) -> Running:
    """The same command once more, alone. Raises Broken unless it ends with 0 and the artifact is whole."""
    job, end = target.run(), time.monotonic() + HANGS_AFTER
    # What a killed process has started may go on for a while.
    while "Wait until it ends" in job.text and time.monotonic() < end:
        job = target.run()
    require_good_end(job)
    if job.exit_code:
        raise Broken(f"the rerun ends with {job.exit_code}: {job.text.strip()[-500:]}")
    require_whole(target, "after the rerun")
    return job
