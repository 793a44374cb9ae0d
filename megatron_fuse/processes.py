"""Processes that end with the process that started them, however that one ends.

Linux kills a process that has asked for it (prctl, PR_SET_PDEATHSIG) when its parent ends; to be exact, when the thread ends that
started it. An exec keeps the setting, and a forked child does not inherit it. Other systems do not have it: there a killed
process leaves its children behind.

As a script, this file runs a command that ends with a parent:  python processes.py PARENT COMMAND ...
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

_LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG = 1
_POLL = 0.5  # seconds between two looks at whether torchrun still runs
_PATIENCE = 30.0  # seconds for a rank to end after torchrun has; as long as torchrun itself waits
STARTED = "MEGATRON_FUSE_STARTED"  # variable of the environment of what a command has started: only the command speaks
INTERRUPTED = 130  # exit code after Ctrl-C
_PASSED_ON = 5.0  # seconds for a command to end at a Ctrl-C that has reached it by itself


def end_with(parent: int) -> None:
    """From now on this process is killed when its parent ends, and at once if that has ended already. parent: its process id."""
    if not _LINUX:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_pool() -> None:
    """end_with for a process of multiprocessing: the `initializer` of a pool or a manager. A Ctrl-C ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)


def end_with_torchrun() -> None:
    """Lets a rank of torchrun end after torchrun has: SIGTERM, at which a training saves and other commands end; later SIGKILL.

    A process that torchrun has not started goes on without its parent, as under nohup.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def tied(words: Sequence[str]) -> list[str]:
    """A command line whose process ends with this one. A program that cannot be started is exit code 127, with a message."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *words] if _LINUX else list(words)


def run_tied(words: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Runs a command that ends with this process, and returns its exit code, -N if signal N ended it. For the main thread.

    The first SIGTERM or SIGUSR1 goes on to the command as SIGTERM, at which a training saves; it ends this process after the
    command has ended. A Ctrl-C at a terminal reaches the command by itself, and one that has not is passed on: this waits for its
    end. Raises KeyboardInterrupt then, and where the command alone was interrupted.
    """
    process, received = None, list[int]()

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        if process is not None and len(received) == 1:
            process.terminate()

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(tied(words), cwd=cwd, env={**(os.environ if env is None else env), STARTED: "1"})
        if received:  # before there was a process
            process.terminate()
        if (code := process.wait()) == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except KeyboardInterrupt:
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PASSED_ON)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
        raise
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), received[0])


def _become(parent: int, words: list[str]) -> None:
    end_with(parent)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        print(f"{words[0]} cannot be started: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
