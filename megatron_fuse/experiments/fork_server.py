"""Starts commands one after another.

Python scripts are forks of a process that has imported the large libraries already. The imports take longer
than many scripts run. A fork has the libraries at once, and shares no state with the next fork. Processes
that a script itself starts are not affected. All processes end with this one, even if it is killed.
"""

import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from megatron_fuse.errors import UserError
from megatron_fuse.processes import end_with, tied

LIBRARIES = ("torch", "transformers.modeling_utils", "matplotlib.pyplot", "megatron_fuse.pipeline")
_MEGATRON = "--megatron"  # argument of the process from which scripts that use Megatron-core are forked


class Commands:
    """Runs one command at a time, all in one directory and environment.

    A context manager: its end ends the processes from which scripts are forked. Use it only from threads that
    live as long as the object: Linux ends those processes, and all their scripts, with the thread that
    started them (processes.py).
    keep_open: file descriptors, for example of a lock, that all scripts hold until the last one has ended.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str], keep_open: Sequence[int] = ()
    ) -> None:
        # With this variable torch looks for a GPU without initialising CUDA. After an initialisation no fork
        # could use CUDA.
        self._directory, self._environment = directory, {**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self._keep_open = tuple(keep_open)
        self._parents: dict[bool, subprocess.Popen[str]] = {}
        self._running: subprocess.Popen[bytes] | None = None
        self._interrupted = False

    def run(self, words: Sequence[str], log: Path, *, megatron: bool = False) -> int:
        """Runs a command and appends its output to the log. Returns its exit code, -N if signal N ended it.

        A script is forked; any other command is started as usual. A script is this interpreter with a path
        that ends in .py, or with -m and a module. megatron: a script of the project that uses Megatron-core;
        other scripts run without the changes that Megatron-core makes in torch. Raises UserError if the
        command cannot be started, or after an interrupt.
        """
        if self._interrupted:
            raise UserError(f"{words[0]} was not started, because the run was interrupted")
        if words[0] == sys.executable and (words[1] == "-m" or words[1].endswith(".py")):
            return self._fork(words[1:], log, megatron)
        program = self._directory / words[0] if os.sep in words[0] else words[0]
        if shutil.which(program, path=self._environment.get("PATH")) is None:
            raise UserError(f"{words[0]} cannot be started: the program does not exist or is not executable")
        with log.open("a", encoding="utf-8") as file:
            self._running = subprocess.Popen(
                tied(words),
                cwd=self._directory,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=self._keep_open,
            )
            try:
                return self._running.wait()
            finally:
                self._running = None

    def interrupt(self) -> None:
        """Ends the running command as Ctrl-C does, and prevents further commands.

        May be called from any thread.
        """
        self._interrupted = True
        for process in (self._running, *self._parents.values()):
            if process is not None:
                process.send_signal(signal.SIGINT)

    def import_libraries(self, *, megatron: bool = False) -> None:
        """Starts the process that imports the libraries, and waits for it.

        Else the first script would wait some seconds.
        """
        if megatron not in self._parents:
            self._parents[megatron] = parent = subprocess.Popen(
                tied([sys.executable, "-m", __name__, *LIBRARIES, *([_MEGATRON] if megatron else [])]),
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=self._keep_open,
                text=True,
            )
            assert parent.stdout is not None
            parent.stdout.readline()  # "ready", or "" if the process has ended

    def _fork(self, words: Sequence[str], log: Path, megatron: bool) -> int:
        self.import_libraries(megatron=megatron)
        parent = self._parents[megatron]
        assert parent.stdin is not None and parent.stdout is not None
        try:
            print(json.dumps({"words": words, "log": str(log.resolve())}), file=parent.stdin, flush=True)
            return int(parent.stdout.readline())
        # The process has ended: it takes no line, or replies with "".
        except (BrokenPipeError, ValueError) as error:
            del self._parents[megatron]
            script = words[1] if words[0] == "-m" else words[0]
            raise UserError(
                f"{script} could not be started: the process that starts it ended with exit code "
                f"{parent.wait()}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for parent in self._parents.values():
            parent.communicate()  # closes its stdin, at which the process ends


def _import_megatron() -> None:
    from megatron_fuse.runtime import enable_cpu_megatron
    from megatron_fuse.runtime.distributed import quiet_third_party_warnings

    quiet_third_party_warnings()
    # With CUDA, the work of Megatron-core at its import must happen in the process that trains.
    if enable_cpu_megatron():
        import megatron_fuse.training.trainer  # noqa: F401


def _serve(libraries: Sequence[str], *, megatron: bool) -> None:
    """Forks a script for every JSON line on stdin, until stdin is closed.

    Writes "ready" to stdout after the imports, then one line with the exit code of each script.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout goes to stderr: text that an import prints must not be taken for a reply
    for name in libraries:
        importlib.import_module(name)
    if megatron:
        _import_megatron()
    server, child = os.getpid(), 0

    # An interrupt must end the script, and not this process: it has to reply with the exit code. It ends when
    # stdin closes.
    def pass_on(number: int, _: FrameType | None) -> None:
        if child:
            os.kill(child, number)

    signal.signal(signal.SIGINT, pass_on)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            # The death signal of the server is not inherited by a fork, and its handler would swallow a
            # Ctrl-C.
            end_with(server)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _become_script(**json.loads(line))
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        child = 0
        try:
            print(code, file=replies, flush=True)
        except BrokenPipeError:  # the process that asked has ended
            return


def _become_script(words: list[str], log: str) -> None:
    """Runs `python *words` in this process, with its output in the log.

    Returns, or raises, as the script does.
    """
    null, output = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666),
    )
    for source, place in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, place)
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve([name for name in sys.argv[1:] if name != _MEGATRON], megatron=_MEGATRON in sys.argv)
