"""Only one run at a time in a directory of checkpoints or metrics:
two runs would remove and replace each other's files."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_fuse.errors import UserError
from megatron_fuse.storage import LockFile

LOCK = ".run.lock"


@contextmanager
def only_one_run(directories: Iterable[Path]) -> Iterator[None]:
    """Holds the locks of these directories until the end of the block. All ranks call it; rank 0 holds the
    locks for all.

    The operating system releases the locks when the process ends, even if it is killed. Raises UserError, on
    every rank, with the owner's host and process if another run holds one of the locks. One broadcast.
    """
    refused: list[str | None] = [None]
    with ExitStack() as held:
        if dist.get_rank() == 0:
            try:
                for directory in dict.fromkeys(path.resolve() for path in directories):
                    held.enter_context(_lock(directory))
            except UserError as error:
                refused = [str(error)]
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise UserError(refused[0])
        yield


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with LockFile(directory / LOCK) as lock:
        if not lock.try_lock(1):
            raise UserError(
                f"{directory}: another run writes there ({lock.owner(1)}). Wait until it ends or stop it, or "
                "set another workdir or --save for this run."
            )
        yield
