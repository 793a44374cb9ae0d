"""The report of a checkpoint's writers, on its way back to the training process."""

import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class WriteResults:
    """One report. The writing process puts it, which an asynchronous save forks;
    the training process takes it.

    It replaces Megatron's queue. That queue is a process of its own: it imports torch again, keeps its memory
    all the time, and never ends if the rank is killed. A pipe does not work: the report is taken only after
    the process that put it has ended.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (without a name, for as long as this lives; a fork has it too)

    def put(self, report: Any) -> None:
        pickle.dump(report, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The report. Raises queue.Empty if there is none, for example after a writer was killed."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError as error:
            raise queue.Empty from error


def use_new_write_results() -> None:
    """Makes a new place for the report of the next save of this process. Each save needs its own."""
    filesystem_async._results_queue = WriteResults()
