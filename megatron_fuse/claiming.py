"""Whether a process takes shards by claim (storage/claims.py), as its environment says.

The processes that it starts inherit this.
"""

import math
import os
from dataclasses import dataclass

DEFAULT_LEASE = 180.0  # seconds
LEASE = "MEGATRON_FUSE_CLAIM"  # the lease in seconds; unset: shards are taken by rank and by locks
NO_WAIT = "MEGATRON_FUSE_NO_WAIT"  # set: the process does not wait for the shards of others


@dataclass(frozen=True)
class Claiming:
    """How a process takes claims. lease: in seconds. waits: for the shards that others make."""

    lease: float = DEFAULT_LEASE
    waits: bool = True

    @property
    def poll(self) -> float:
        """The most seconds between two looks at shards that other processes make."""
        return min(self.lease / 60, 1.0)

    @property
    def patience(self) -> float:
        """Seconds without a shard to make, after which the process leaves."""
        # Long enough to see that an owner has ended, which takes a quarter of the lease.
        return math.inf if self.waits else self.lease / 3


def claiming() -> Claiming | None:
    """How this process takes claims; None if it does not."""
    lease = os.environ.get(LEASE)
    return Claiming(float(lease), NO_WAIT not in os.environ) if lease else None
