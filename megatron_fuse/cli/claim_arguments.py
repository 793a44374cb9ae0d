"""The arguments of commands whose shards processes can take by claim (storage/claims.py)."""

import argparse
import math
import os

from megatron_fuse.claiming import DEFAULT_LEASE, LEASE, NO_WAIT
from megatron_fuse.errors import UserError

_LEAST = 1.0  # seconds


def add_claim_arguments(parser: argparse.ArgumentParser, *, may_leave: bool) -> None:
    """may_leave: whether a process may end while others still make shards."""
    parser.add_argument(
        "--claim",
        nargs="?",
        type=float,
        const=DEFAULT_LEASE,
        metavar="SECONDS",
        help="share the shards with all processes that run this command with --claim, on any machines over "
        "one file system: each process claims a shard that is free, and a claim that its process has not "
        f"renewed for SECONDS (default: {DEFAULT_LEASE:g}) is taken over",
    )
    if may_leave:
        parser.add_argument(
            "--no-wait",
            action="store_true",
            help="with --claim: go on, and end with exit code 0, if no shard was free for a third of "
            "SECONDS; default: wait until all shards are made",
        )


def take_claims(arguments: argparse.Namespace) -> bool:
    """Says in the environment, for this process and those that it starts, whether shards are claimed.

    Returns whether they are. Raises UserError for values that are not possible.
    """
    leaves = getattr(arguments, "no_wait", False)
    if arguments.claim is None:
        if leaves:
            raise UserError("--no-wait: without --claim it has no meaning. Add --claim, or remove it.")
        return LEASE in os.environ
    if not _LEAST <= arguments.claim < math.inf:
        raise UserError(f"--claim {arguments.claim:g}: the number of seconds must be at least {_LEAST:g}.")
    os.environ[LEASE] = str(arguments.claim)
    if leaves:
        os.environ[NO_WAIT] = "1"
    return True
