"""A process that has imported the large libraries once and forks jobs, which can be killed and stopped at
moments of their own.

A moment is right before one of the job's own file system operations under a directory, which Python's audit
events announce. Operations are counted from 1; every job's count lies in a file that all processes share.
"""

import ctypes
import gc
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
ENDED = 2**40  # is added to the count of a job that ends by itself
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2  # what lets root ignore permissions
_PERMISSIONS_VERSION = 0x20080522


@dataclass(frozen=True)
class Watch:
    """What a job does to itself. kill_at, stop_at: the operation before which it gets SIGKILL (or `number`)
    or SIGSTOP; 0: never.

    half: where that is a rename, the file is cut in half first, as a kill within the writing leaves it.
    after: (job, operations) before which this one does not begin. file_size: the largest file that it may
    write, in bytes. plain_user: permissions hold for it, even if it runs as root.
    """

    under: Path = ROOT
    kill_at: int = 0
    number: int = signal.SIGKILL
    stop_at: int = 0
    half: bool = False
    after: tuple[int, int] | None = None
    delay: float = 0
    file_size: int = 0
    plain_user: bool = False


@dataclass(frozen=True)
class Job:
    """A function of an importable module in a process of its own. place: of its count, different for jobs
    at the same time.
    """

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    output: Path
    counts: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    place: int = 0


def run_tool(name: str, words: Sequence[str]) -> None:
    """The command as a shell would start it."""
    sys.argv = [name, *words]
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")


class Running:
    """A job that has been started."""

    def __init__(self, server: "Server", job: Job, pid: int) -> None:
        self._server, self.job, self.pid = server, job, pid
        self.exit_code: int | None = None  # -N where signal N ended it
        self.is_stopped = False

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.exit_code is None:
            status = self._server.ask(self.pid)
            if status is not None and os.WIFSTOPPED(status):
                self.is_stopped = True
            elif status is not None:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None

    def send(self, number: int) -> None:
        if not self.poll():
            os.kill(self.pid, number)
            self.is_stopped &= number != signal.SIGCONT

    @property
    def text(self) -> str:
        return self.job.output.read_text(encoding="utf-8", errors="replace")


class Server:
    """Starts jobs as forks of a process that has imported `modules` and has called `warm_up`, whose caches
    all jobs have then.
    """

    def __init__(
        self, modules: Sequence[str], warm_up: Callable[..., object] | None = None, *arguments: Any
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, list(modules), warm_up, arguments), daemon=True
        )
        self._process.start()
        other.close()
        self._connection.recv()  # ready

    def ask(self, request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()

    def start(self, job: Job) -> Running:
        return Running(self, job, self.ask(job))

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def end_all(jobs: Sequence[Running]) -> None:
    """Kills what still runs, and what it has started."""
    for job in jobs:
        if not job.poll():  # else its process id may be another process's by now
            os.killpg(job.pid, signal.SIGKILL)
    while not all(job.poll() for job in jobs):
        time.sleep(0.001)


def _serve(
    connection: Connection,
    modules: Sequence[str],
    warm_up: Callable[..., object] | None,
    arguments: Sequence[Any],
) -> None:
    """Replies to a Job with the pid of its process, to a pid with a change of that process's state, as
    waitpid has it, or None.
    """
    for name in modules:
        importlib.import_module(name)
    if warm_up:
        warm_up(*arguments)
    gc.collect()
    gc.freeze()  # so that the collector does not write to pages that forks share
    children = set()
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            break
        if isinstance(request, Job):
            if not (child := os.fork()):
                connection.close()
                _become(request)
            children.add(child)
            connection.send(child)
        else:
            pid, status = os.waitpid(request, os.WNOHANG | os.WUNTRACED)
            if pid and not os.WIFSTOPPED(status):
                children.discard(pid)
            connection.send(status if pid else None)
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def _become(job: Job) -> None:
    """This process from now on is the job; never returns."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        output = os.open(job.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for source, place in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, place)
        os.environ |= job.environment
        _begin(job)
        job.function(*job.arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            np.memmap(job.counts, np.int64, "r+")[job.place] += ENDED
        os._exit(code)


def _begin(job: Job) -> None:
    """Waits for the moment to begin, and has this process watched from then on."""
    watch, counts = job.watch, np.memmap(job.counts, np.int64, "r+")
    if watch.after:
        end = time.monotonic() + 2  # the other may be killed before it gets there
        while counts[watch.after[0]] < watch.after[1] and time.monotonic() < end:
            time.sleep(0.001)
    time.sleep(watch.delay)
    if watch.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (watch.file_size, resource.RLIM_INFINITY))
    if watch.plain_user:
        _obey_permissions()
    under = str(watch.under)

    def happen(event: str, arguments: tuple) -> None:
        if event not in _OPERATIONS or not _counts(event, arguments, under):
            return
        counts[job.place] += 1
        now = counts[job.place]
        if now == watch.stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        if now == watch.kill_at:
            if watch.half and event == "os.rename":
                with suppress(OSError):  # a directory
                    os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os.kill(os.getpid(), watch.number)

    if watch.number == signal.SIGINT:
        # Not ignored, as where the tests run in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.addaudithook(happen)


def _counts(event: str, arguments: tuple, under: str) -> bool:
    path = str(arguments[0])
    if event == "open":
        return path.startswith(under) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    # Shutil.rmtree's names are relative to a directory.
    return path.startswith(under) or not path.startswith("/")


def _obey_permissions() -> None:
    """Takes root's right to ignore permissions from this process; without effect on other users."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (
            ("effective", ctypes.c_uint32),
            ("permitted", ctypes.c_uint32),
            ("inheritable", ctypes.c_uint32),
        )

    libc, header, data = ctypes.CDLL(None, use_errno=True), Header(_PERMISSIONS_VERSION, 0), (Data * 2)()
    libc.capget(ctypes.byref(header), data)
    data[0].effective &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    if libc.capset(ctypes.byref(header), data):
        raise OSError(ctypes.get_errno(), "capset")
