"""Verifies the fusion data while a run makes its first steps, so that no checkpoint comes from damaged data.

One rank of each node compares the checksums (dataset/checksums.py). The other ranks get the result between
two steps, in the all-reduce of interruption.py. The first checkpoint waits for the end of the comparison.
"""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_fuse.dataset.checksums import BackgroundVerification
from megatron_fuse.errors import UserError
from megatron_fuse.storage import Artifact

# In this order, so that the highest status of all ranks is that of the data.
WHOLE, UNKNOWN, DAMAGED = range(3)


class DataCheck:
    """Starts to compare at once and stops at the end of its `with` block.

    All ranks call heed and finish together.

    artifacts: the artifacts to compare; empty with --no-verify.
    """

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._compares = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self._artifacts = artifacts
        self._verification = BackgroundVerification(artifacts if self._compares else [])
        self._settled = not artifacts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises the damage of the data instead of an error that it may have caused, such as an id outside
        the vocabulary or NaN."""
        with self._verification:
            if isinstance(error, Exception) and not self._settled:
                failure = self._verification.wait()
                if failure is None and not self._compares:
                    with BackgroundVerification(self._artifacts) as verification:
                        failure = verification.wait()
                if failure:
                    raise _ended_by(str(failure)) from error

    @property
    def status(self) -> int:
        """What this rank knows of the data: WHOLE, UNKNOWN or DAMAGED."""
        if self._verification.failure:
            return DAMAGED
        return WHOLE if self._verification.done else UNKNOWN

    def heed(self, highest: int) -> None:
        """Called between two steps. highest: the highest status of all ranks. Raises UserError on all ranks
        for damaged data."""
        if highest == DAMAGED:
            self._share_failures()
        self._settled = self._settled or highest == WHOLE

    def finish(self) -> None:
        """Waits until all ranks know that the data are whole.

        Raises UserError, on all ranks, if the data are damaged.

        Collectives: one gather of a message from each rank; none if the data are already known to be whole.
        """
        if not self._settled:
            self._verification.wait()
            self._share_failures()
            self._settled = True

    def _share_failures(self) -> None:
        messages: list[str | None] = [None] * dist.get_world_size()
        failure = self._verification.failure
        dist.all_gather_object(messages, str(failure) if failure else None)
        if first_message := next((message for message in messages if message), None):
            self._settled = True
            raise _ended_by(first_message) from failure


def _ended_by(message: str) -> UserError:
    return UserError(
        f"{message.removesuffix('.')}. Training ends. No checkpoint was written from these data since it "
        "started."
    )
