"""Fuzzing of the files that users bring: drawn damage, one reader at a time, and a law about how each case
may end.

The law: a reader succeeds, or raises a UserError (or what the system says of a named file, which commands
report likewise) of at most 600 characters that names the file and the key or line, within CASE_SECONDS of
processor time and CASE_BYTES of further memory. Cases run in a forked child that reports each one, so that a
case that kills the interpreter or hangs in native code is known too.

A module `*_targets.py` beside this one lists its readers as TARGETS. A case is one draw from (seed, target,
number) alone:

    FUZZ_TARGET=instructions FUZZ_SEED=7 FUZZ_CASE=123 pytest tests/fuzz -k one_case -s
"""

import faulthandler
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from file_damage import Mutation, copy_files, mutate

from megatron_fuse.errors import UserError

CASE_SECONDS = 10
CASE_BYTES = 2 << 30
MOST_CHARACTERS = 600
_BEGUN = "begun"
_MOST_KEPT = 20  # faults of one child whose files stay
_SILENT_SECONDS = 300  # a child that has not said anything for so long hangs where no signal is looked at


@dataclass(frozen=True)
class FuzzTarget:
    """One reader of user files.

    make_seeds(directory): writes valid files, once per campaign. run(directory): reads them as the project
    does; what it writes goes below the directory too. files: patterns of the files to damage, relative to the
    directory. share: of the campaign's cases, relative to the other targets; small for slow readers. change:
    the damage, if not `mutate`.
    names: what a message may name in the place of a file with its key or line, such as a recipe's key.
    """

    name: str
    make_seeds: Callable[[Path], None]
    run: Callable[[Path], object]
    files: tuple[str, ...] = ("**/*",)
    share: float = 1.0
    change: Callable[[Path, Random], Mutation] = mutate
    names: tuple[str, ...] = ()


def all_targets() -> dict[str, FuzzTarget]:
    modules = sorted(path.stem for path in Path(__file__).parent.glob("*_targets.py"))
    targets = [target for module in modules for target in importlib.import_module(module).TARGETS]
    assert len({target.name for target in targets}) == len(targets)
    return {target.name: target for target in targets}


@dataclass
class Outcome:
    """How a case ended. kind: accepted, refused, or a fault: traceback, message, time, memory, killed."""

    case: int
    kind: str
    file: str = ""
    what: str = ""
    detail: str = ""  # the message, or the end of the traceback

    @property
    def fault(self) -> bool:
        return self.kind not in ("accepted", "refused")


@dataclass
class Result:
    """Of all cases of one target."""

    target: str
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Outcome] = field(default_factory=list)

    def line(self) -> str:
        counts = {
            kind: self.counts[kind]
            for kind in ("accepted", "refused", *sorted({f.kind for f in self.faults}))
        }
        return json.dumps({"target": self.target, "seed": self.seed, "cases": self.counts.total(), **counts})


class CaseTimeout(BaseException):
    """No `except Exception` may take this for an error of the file."""


def run_campaign(target: FuzzTarget, seeds: Path, work: Path, *, seed: int, cases: range) -> Result:
    """All cases in children, a new one after each that dies.

    Damaged files of the first faults stay in work/kept.
    """
    result = Result(target.name, seed)
    todo = cases
    while todo:
        begun = _run_child(target, seeds, work, seed, todo, result)
        if begun is None:
            break
        begun.detail += f" [files: {_keep(work, f'{target.name}-{seed}-{begun.case}')}]"
        _record(result, begun)
        todo = range(begun.case + 1, cases.stop)
    return result


def _record(result: Result, outcome: Outcome) -> None:
    result.counts[outcome.kind] += 1
    if outcome.fault:
        result.faults.append(outcome)


def _run_child(
    target: FuzzTarget, seeds: Path, work: Path, seed: int, cases: range, result: Result
) -> Outcome | None:
    """Runs cases until they are done, or until the child dies: then the case in which it did.

    Raises AssertionError where it does not come to the first case: the reader fails on the seeds.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _serve(target, seeds, work, seed, cases, writer)
    os.close(writer)
    begun, finished, silent, text = None, False, False, b""
    while not silent:
        silent = not select.select([reader], [], [], _SILENT_SECONDS)[0]
        data = b"" if silent else os.read(reader, 1 << 16)
        if not data:
            break
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            finished = said is None
            if not finished:
                outcome = Outcome(**said)
                begun = outcome if outcome.kind == _BEGUN else None
                if begun is None:
                    _record(result, outcome)
    os.close(reader)
    if silent:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if finished:
        return None
    how = "a hang" if silent else f"exit code {os.waitstatus_to_exitcode(status)}"
    log = (work / f"{target.name}.log").read_text(errors="replace")
    assert begun, f"{target.name}: {how} outside of the cases:\n{log[-3000:]}"
    begun.kind, begun.detail = "killed", f"{how}: {log[max(log.rfind('Fatal Python error'), 0) :][:800]}"
    return begun


def _serve(target: FuzzTarget, seeds: Path, work: Path, seed: int, cases: range, writer: int) -> None:
    """The child: never returns."""

    def say(outcome: Outcome | None) -> None:
        os.write(writer, json.dumps(outcome and asdict(outcome)).encode() + b"\n")

    try:
        log = os.open(work / f"{target.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(2)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # a pool of threads does not live on in a forked process
        copy_files(seeds, work / "case")
        target.run(work / "case")  # imports happen here, before there is a limit
        kept = 0
        for case in cases:
            outcome = run_case(target, seeds, work, seed=seed, case=case, begin=say)
            if outcome.fault and kept < _MOST_KEPT:
                kept += 1
                outcome.detail += f" [files: {_keep(work, f'{target.name}-{seed}-{case}')}]"
            say(outcome)
        say(None)
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
        os._exit(1)
    os._exit(0)


def _keep(work: Path, name: str) -> Path:
    kept = work / "kept" / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(exist_ok=True)
    if (work / "case").exists():
        (work / "case").rename(kept)
    return kept


def damage(target: FuzzTarget, directory: Path, *, seed: int, case: int) -> Mutation:
    """Changes one file under a directory, as drawn for this case."""
    random = Random(f"{seed}/{target.name}/{case}")
    paths = {path for pattern in target.files for path in directory.glob(pattern) if path.is_file()}
    path = random.choice(sorted(paths))
    return target.change(path, random)


def run_case(
    target: FuzzTarget,
    seeds: Path,
    work: Path,
    *,
    seed: int,
    case: int,
    begin: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """begin: is told of the case before it runs."""
    directory = work / "case"
    copy_files(seeds, directory)
    mutation = damage(target, directory, seed=seed, case=case)
    begin(Outcome(case, _BEGUN, mutation.file, mutation.what))
    try:
        with _limits():
            target.run(directory)
    except UserError as error:
        kind, detail = _judged(str(error), mutation, directory, target)
    except CaseTimeout:
        kind, detail = "time", _end_of_traceback()
    except MemoryError:
        kind, detail = "memory", _end_of_traceback()
    except OSError as error:
        if error.filename is None:
            kind, detail = "traceback", _end_of_traceback()
        else:  # as every command reports it (errors.exit_code)
            kind, detail = _judged(f"{error.filename}: {error.strerror}", mutation, directory, target)
    except BaseException:
        kind, detail = "traceback", _end_of_traceback()
    else:
        kind, detail = "accepted", ""
    return Outcome(case, kind, mutation.file, mutation.what, detail[:3000])


def _judged(message: str, mutation: Mutation, directory: Path, target: FuzzTarget) -> tuple[str, str]:
    fault = misfit(message, mutation, directory, target.names)
    return ("message", f"{fault}: {message}") if fault else ("refused", message)


def misfit(message: str, mutation: Mutation, directory: Path, names: tuple[str, ...] = ()) -> str | None:
    """What is wrong with an error's message, None if nothing is."""
    if len(message) > MOST_CHARACTERS:
        return f"{len(message)} characters"
    if any(name in message for name in names):
        return None
    if str(directory) not in message and mutation.file not in message:
        return "names no file"
    # Of damaged bytes nobody knows a key; a header of safetensors is judged by its library.
    by_bytes = mutation.what.startswith(("bytes", "file", "text", "header"))
    if "not valid JSON" in message:
        return None  # of the file as a whole
    has_line = re.search(r"(:\d+|\b(line|row|item|char|column) \d+)", message)
    if (
        not by_bytes
        and mutation.keys
        and not has_line
        and not any(key in message for key in mutation.keys if key)
    ):
        return f"names no line and none of the keys {', '.join(mutation.keys)}"
    return None


def _end_of_traceback() -> str:
    """The exception and our own innermost lines."""
    kind, error, trace = sys.exc_info()
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(trace)]
    return f"{kind.__name__ if kind else ''}: {ascii(str(error))[:300]} at {' > '.join(frames[-6:])}"


def _time_is_up(*_: object) -> None:
    raise CaseTimeout


@contextmanager
def _limits() -> Iterator[None]:
    """Of processor time, since other processes may be at work; of address space, above what the process
    has now.
    """
    pages = (
        int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + CASE_BYTES, hard))
    before = signal.signal(signal.SIGPROF, _time_is_up)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS, 1)  # again, where a handler of ours has swallowed it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def shares(targets: dict[str, FuzzTarget], cases: int) -> dict[str, int]:
    """How many cases each target gets: at least one, all together `cases` or more."""
    whole = sum(target.share for target in targets.values())
    return {name: max(1, -int(-cases * target.share // whole)) for name, target in targets.items()}
