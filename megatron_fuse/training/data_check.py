"""Fusion data against its checksums while a run takes its first steps: no checkpoint comes from damaged data.

One rank of each node compares (dataset/checksums.py); the other ranks learn of it between two steps, in the all-reduce of
interruption.py. The first checkpoint waits for the comparison to end.
"""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_fuse.dataset.checksums import BackgroundVerification
from megatron_fuse.errors import UserError
from megatron_fuse.storage import Artifact

WHOLE, UNKNOWN, DAMAGED = range(3)  # the highest of all ranks is what is known of the data


class DataCheck:
    """Begins at once, and ends with its `with` block. All ranks call heed and finish together.

    artifacts: what is compared; nothing where there are none, as with --no-verify.
    """

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._compares = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self._artifacts = artifacts
        self._verification = BackgroundVerification(artifacts if self._compares else [])
        self._settled = not artifacts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Damaged data may end a run in other ways first: as an id outside the vocabulary, or NaN. Then this is what is raised."""
        with self._verification:
            if isinstance(error, Exception) and not self._settled:
                failure = self._verification.wait()
                if failure is None and not self._compares:
                    with BackgroundVerification(self._artifacts) as mine:
                        failure = mine.wait()
                if failure:
                    raise _ended_by(str(failure)) from error

    @property
    def status(self) -> int:
        """What this rank knows."""
        if self._verification.failure:
            return DAMAGED
        return WHOLE if self._verification.done else UNKNOWN

    def heed(self, highest: int) -> None:
        """Between two steps. highest: status of the rank where it is highest. Raises UserError on all ranks for damaged data."""
        if highest == DAMAGED:
            self._share_failures()
        self._settled = self._settled or highest == WHOLE

    def finish(self) -> None:
        """Waits until all ranks know that the data are whole. Raises UserError, on all ranks, where they are not.

        Collectives: one gather of a message from each rank, until the data are known to be whole; none from then on.
        """
        if not self._settled:
            self._verification.wait()
            self._share_failures()
            self._settled = True

    def _share_failures(self) -> None:
        messages: list[str | None] = [None] * dist.get_world_size()
        failure = self._verification.failure
        dist.all_gather_object(messages, str(failure) if failure else None)
        if found := next((message for message in messages if message), None):
            self._settled = True
            raise _ended_by(found) from failure


def _ended_by(message: str) -> UserError:
    return UserError(f"{message}. Training ends; no checkpoint was written from these data since it started")
