"""The commands of a run: Python scripts as forks of a process that has imported the large libraries already.

Their imports take longer than many of a run's commands do. A fork has them at once, and leaves nothing behind for the next one.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from megatron_fuse.errors import UserError

LIBRARIES = ("torch", "transformers", "matplotlib.pyplot", "megatron_fuse.fusion_data")
_TRAINING = "--training"  # on the command line of the process that training scripts are forked from


class Commands:
    """Runs one command at a time, all in one directory and environment; a context, which ends what scripts are forked from."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._where = {"cwd": directory, "env": dict(environment)}
        self._parents: dict[bool, subprocess.Popen[str]] = {}

    def run(self, words: Sequence[str], log: Path, *, megatron: bool = False) -> int:
        """The command's exit code, -N if signal N ended it; its output is appended to the log.

        A script, named by this interpreter and a path in .py, is forked; everything else is started as it is. megatron: a script of the
        project that trains; all others run without what that changes in torch. Raises UserError where nothing can be forked from.
        """
        if words[0] == sys.executable and words[1].endswith(".py"):
            return self._fork(words[1:], log, megatron)
        with log.open("a", encoding="utf-8") as file:
            return subprocess.run(words, **self._where, stdout=file, stderr=subprocess.STDOUT, check=False).returncode

    def _fork(self, words: Sequence[str], log: Path, megatron: bool) -> int:
        if megatron not in self._parents:  # not before it is needed: it takes seconds
            self._parents[megatron] = subprocess.Popen(
                [sys.executable, "-m", __name__, *LIBRARIES, *([_TRAINING] if megatron else [])],
                **self._where,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        parent = self._parents[megatron]
        assert parent.stdin is not None and parent.stdout is not None
        try:
            print(json.dumps({"words": words, "log": str(log.resolve())}), file=parent.stdin, flush=True)
            return int(parent.stdout.readline())
        except (BrokenPipeError, ValueError) as error:  # no reply
            del self._parents[megatron]
            raise UserError(f"the process that {words[0]} was to be forked from ended with {parent.wait()}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for parent in self._parents.values():
            parent.communicate()  # closes its stdin, on which it ends


def _import_for_training() -> None:
    from megatron_fuse.runtime import enable_cpu_megatron
    from megatron_fuse.runtime.distributed import quiet_third_party_warnings

    quiet_third_party_warnings()
    if enable_cpu_megatron():  # with CUDA, what Megatron-core does at import belongs to the process that trains
        import megatron_fuse.training.trainer  # noqa: F401


def _serve(libraries: Sequence[str], *, megatron: bool) -> None:
    """One JSON line per script on stdin, one exit code per line on stdout, until stdin is closed."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing that is printed at import is taken for a reply
    for name in libraries:
        importlib.import_module(name)
    if megatron:
        _import_for_training()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become_script(**json.loads(line))
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            print(code, file=replies, flush=True)
        except BrokenPipeError:  # who asked is gone
            return


def _become_script(words: list[str], log: str) -> None:
    """This process from now on is `python *words`; returns, or raises, as the script does."""
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for source, place in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, place)
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve([name for name in sys.argv[1:] if name != _TRAINING], megatron=_TRAINING in sys.argv)
