"""How a stage writes its artifact: by shards, shared between processes, resumed after an interruption."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_fuse.claiming import Claiming, claiming
from megatron_fuse.storage.artifact import Artifact, Plan, completed
from megatron_fuse.storage.claimed_shard_files import ClaimedShardFiles, TakenOver
from megatron_fuse.storage.shard_files import Counts, ShardFiles
from megatron_fuse.storage.shard_progress import ShardProgress
from megatron_fuse.text_safety import brief

logger = logging.getLogger(__name__)

_POLL = 0.05  # seconds between the first two looks at shards that other processes make
_REMINDER = 60.0  # seconds between two messages of a process that waits


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) under torchrun, else (0, 1). This is by default the share of a process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


Share = tuple[int, int]
"""(r, w): every w-th shard, beginning with shard r."""

MakeShard = Callable[[int, Path], Counts]
MakeShards = Callable[[int, dict[str, Path]], dict[str, Counts]]


def run_plan(
    plan: Plan, make_shard: MakeShard, progress: ShardProgress | None = None, share: Share | None = None
) -> Artifact | None:
    """Makes the missing shards of this process, then the manifest if all shards of all processes are
    finished.

    make_shard(index, prefix) writes files named `prefix.<suffix>` and returns counts, which are added up in
    the manifest. The prefix lies in a directory that only this process uses. The files are moved into the
    artifact when the shard is whole.

    progress: shows the work; make_shard may update it. By default it counts shards. share: the shards of this
    process; default: rank_and_world().

    Returns the artifact, or None if other processes still make shards. Raises UserError if the directory
    holds another plan or cannot be written.
    """
    return run_plans(
        {"": plan}, lambda index, prefixes: {"": make_shard(index, prefixes[""])}, progress, share
    ).get("")


def run_plans(
    plans: Mapping[str, Plan],
    make_shards: MakeShards,
    progress: ShardProgress | None = None,
    share: Share | None = None,
) -> dict[str, Artifact]:
    """run_plan for several plans that have the same shards and share work.

    Returns the finished artifacts by name.

    make_shards(index, {name: prefix}) makes one shard for the plans that lack it, and returns the counts by
    name. Data made together may differ in rounding from data made alone. So if the work on a shard was cut
    off when only some of its plans were marked, the shard is made again for all of them.

    A process holds the lock of a shard while it makes the shard. A second process with the same rank makes
    the other shards first. Then it waits, and makes the shards that a process which has ended left
    unfinished. A process that takes shards by claim (claims.py) has the shards of all ranks as its own, and
    waits only if its environment says so.
    """
    by_claim = claiming()
    artifacts = {name: completed(plan) for name, plan in plans.items()}
    unfinished = {name: plans[name] for name in plans if artifacts[name] is None}
    if unfinished:
        with ExitStack() as stack:
            # No deadlock is possible: all processes enter the directories in the same order, and _make only
            # tries the locks of a shard. It never waits for one while it holds another.
            files = {name: stack.enter_context(_open(unfinished[name], by_claim)) for name in unfinished}
            progress = progress or ShardProgress(_where(files.values()), "shards", [1] * _shards(files))
            try:
                with progress.over(files.values(), complete=len(plans) - len(files)):
                    # A process that takes shards by claim may take any of them.
                    of_this_process = (0, 1) if by_claim else share or rank_and_world()
                    _make_missing(files, make_shards, progress, of_this_process, by_claim)
            except Exception:
                for each in files.values():
                    each.forget_if_empty()
                raise
            # All plans or none. Some shards may have the marker of one plan only, after a kill between two
            # markers; then no plan is finished.
            if all(each.is_whole() for each in files.values()):
                artifacts |= {name: each.finish() for name, each in files.items()}
    elif progress:
        progress.log_complete(len(plans))
    return {name: artifact for name, artifact in artifacts.items() if artifact}


def _open(plan: Plan, by_claim: Claiming | None) -> ShardFiles:
    return ClaimedShardFiles(plan, by_claim.lease) if by_claim else ShardFiles(plan)


def _make_missing(
    files: dict[str, ShardFiles],
    make_shards: MakeShards,
    progress: ShardProgress,
    share: Share,
    by_claim: Claiming | None,
) -> None:
    # Shards are taken in stride, so that any number of processes ends with the same files. Each round tries
    # all pending shards; only if other processes have all of them does this process sleep.
    first, step = share
    pending = list(range(first, _shards(files), step))
    reminder = made = time.monotonic()
    most = by_claim.poll if by_claim else _POLL
    wait = _POLL
    while pending:
        busy = [index for index in pending if not _make(files, index, make_shards, progress)]
        now = time.monotonic()
        if len(busy) < len(pending):
            made, wait = now, _POLL
        elif by_claim and now - made >= by_claim.patience:
            logger.info(
                f"{_where(files.values())}: shards that other processes make: {len(busy)}. This process does "
                "not wait for them"
            )
            return
        else:
            if now >= reminder:
                owners = {each.owner(busy[0]) for each in files.values()}
                made_by = " and ".join(sorted(owners))
                logger.info(f"{_where(files.values())}: waiting for shard {busy[0]}, which {made_by} makes")
                reminder = now + _REMINDER
            time.sleep(wait)
            wait = min(2 * wait, most)
        pending = busy


def _make(files: dict[str, ShardFiles], index: int, make_shards: MakeShards, progress: ShardProgress) -> bool:
    """Makes a shard for the plans that lack it, if any. Returns False if another process makes it."""
    # First without a lock: most shards of a resumed run are finished, and need none.
    if not _due(files, index):
        return True
    # All are looked at before one is taken: a claim that is given back costs a file.
    if any(each.is_taken(index) for each in files.values()):
        return False
    with ExitStack() as stack:
        for each in files.values():
            if not each.try_lock(index):
                return False
            stack.callback(each.unlock, index)
        due = _due(files, index)  # again under the lock: another process may have made the shard in between
        if not due:
            return True
        prefixes = {name: stack.enter_context(each.workplace(index)) for name, each in due.items()}
        progress.begin_shard(index, plans=len(due))
        try:
            counts = make_shards(index, prefixes)
            for name, each in due.items():
                each.install(index, prefixes[name], counts[name], together=sorted(due))
                logger.debug(f"{each.directory}: shard {len(each.marked())}/{len(each.names)}")
        except Exception as error:
            if all(each.holds(index) for each in files.values()):
                raise
            progress.end_shard(files.values())
            _report_loss(files, index, error)
            return False
        progress.end_shard(files.values())
    return True


def _report_loss(files: dict[str, ShardFiles], index: int, error: Exception) -> None:
    why = "" if isinstance(error, TakenOver) else f" ({brief(str(error))})"
    logger.warning(
        f"{_where(files.values())}: another process has taken over shard {index}, because this process was "
        f"stopped or too slow to renew its claim. What it has made of the shard is not used{why}"
    )


def _due(files: dict[str, ShardFiles], index: int) -> dict[str, ShardFiles]:
    """The plans for which a shard must be made.

    These are the plans that lack it, and those whose marker names one of these as made together with it.
    """
    markers = {name: each.marker(index) for name, each in files.items()}
    missing = {name for name, marker in markers.items() if marker is None}
    cut_off = {
        name for name, marker in markers.items() if marker and missing & set(marker.get("together", []))
    }
    return {name: each for name, each in files.items() if name in missing | cut_off}


def _shards(files: dict[str, ShardFiles]) -> int:
    return len(next(iter(files.values())).names)


def _where(files: Iterable[ShardFiles]) -> str:
    return ", ".join(str(each.directory) for each in files)


def shard_bounds(items: int, shard_size: int) -> np.ndarray:
    """[shards + 1] int64: the first item of every shard, and at the end the number of items.

    No items give one empty shard.
    """
    return np.unique(np.append(np.arange(0, max(items, 1), shard_size), items)) if items else np.array([0, 0])
