"""What a checkpoint's writers report, on its way back to the process that trains."""

import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class WriteResults:
    """One report, put by the process that writes, which an asynchronous save forks, and taken by the one that trains.

    In place of Megatron's queue, which is a process of its own: it imports torch again, keeps its memory all the time, and goes on
    for ever where the rank is killed. A pipe would not do: the report is taken only after the process that put it has ended.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (without a name, for as long as this lives; a fork has it too)

    def put(self, report: Any) -> None:
        pickle.dump(report, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Raises queue.Empty where nothing was put, as of a writer that was killed."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError as error:
            raise queue.Empty from error


def use_new_write_results() -> None:
    """Gives the next save of this process a place for its report. Each save takes one of its own."""
    filesystem_async._results_queue = WriteResults()
