"""Processes that end when their parent ends, even if the parent is killed.

A process can ask Linux to kill it when its parent ends (prctl, PR_SET_PDEATHSIG); more precisely, when the
thread that started it ends. The setting survives exec. A forked child does not inherit it. Other systems do
not have it: there a killed process leaves its children behind.

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
# Environment variable of the processes that a command starts: they print no messages.
STARTED = "MEGATRON_FUSE_STARTED"
INTERRUPTED = 130  # exit code after Ctrl-C
# Seconds in which a command must end after a Ctrl-C, before SIGINT is sent to it.
_PASSED_ON = 5.0


def end_with(parent: int) -> None:
    """From now on this process is killed when its parent ends, at once if the parent has ended already.

    parent: the parent's process id. Raises OSError if the system refuses. Does nothing on systems other than
    Linux.
    """
    if not _LINUX:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # The parent may have ended before prctl: its end then sends no signal any more.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_pool() -> None:
    """end_with for a process of multiprocessing: pass it as the `initializer` of a pool or a manager.

    A Ctrl-C ends the process without a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)


def end_with_torchrun() -> None:
    """Lets a rank of torchrun end after torchrun itself has ended.

    The rank gets SIGTERM, at which a training saves and other commands end, and SIGKILL 30 seconds later. A
    process that torchrun did not start goes on without its parent, as under nohup.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    # PR_SET_PDEATHSIG would kill the rank at once. This thread gives a training time to save.
    while os.getppid() == parent:
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def tied(words: Sequence[str]) -> list[str]:
    """A command line that runs `words` in a process that ends with this one.

    If the program cannot be started, the exit code is 127, with a message on stderr.
    """
    # -I -S: this file needs none of the environment's packages, so that its interpreter starts fast.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *words] if _LINUX else list(words)


def run_tied(words: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Runs a command that ends with this process. Returns its exit code, -N if signal N ended it.

    Only for the main thread. The first SIGTERM or SIGUSR1 is sent on to the command as SIGTERM, at which a
    training saves. After the command has ended, this process gets the same signal. A Ctrl-C at a terminal
    reaches the command directly; if the command does not end within 5 seconds, it gets SIGINT from here, and
    this function waits for its end.

    Raises KeyboardInterrupt after a Ctrl-C, also if only the command was interrupted.
    """
    process, received = None, list[int]()

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        if process is not None and len(received) == 1:
            process.terminate()

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(
            tied(words), cwd=cwd, env={**(os.environ if env is None else env), STARTED: "1"}
        )
        if received:  # the signal arrived before `process` was assigned, so that pass_on could not send it on
            process.terminate()
        if (code := process.wait()) == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except KeyboardInterrupt:
        # A terminal sends Ctrl-C to the command too; `kill -INT` sends it to this process alone. A second
        # SIGINT would end a command that still cleans up, so it is sent only after a wait.
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
        # The handlers come back first, so that the signal then acts on this process as it would have without
        # a command.
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
