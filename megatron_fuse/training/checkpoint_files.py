"""Publishes and removes checkpoint directories, in one process: by renaming, so that an incomplete checkpoint
never looks complete."""

import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.storage.files import flush_to_disk, remove_abandoned, temporary_then_rename

# Files that name a checkpoint of the directory.
LATEST, BEST = "latest_checkpointed_iteration.txt", "best_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Retention:
    """Keeps the newest `last` checkpoints, and those at multiples of `interval`.

    With neither given it keeps all.

    With `interval` alone the newest checkpoint stays too, as with Megatron-LM's --save-retain-interval.
    """

    last: int | None = None
    interval: int | None = None

    def expired(self, iterations: Iterable[int], newest: int, named: Iterable[int | None]) -> list[int]:
        """The checkpoints at `iterations` that can be removed when `newest` is complete.

        named: the best and the latest, which stay. Checkpoints after `newest` stay too: they are of a run
        that went further before. So does iteration 0, which holds imported weights.
        """
        if self.last is None and self.interval is None:
            return []
        earlier = sorted((iteration for iteration in iterations if 0 < iteration < newest), reverse=True)
        stay = {*named, *earlier[: (self.last or 1) - 1]}
        return [
            iteration
            for iteration in earlier
            if iteration not in stay and (self.interval is None or iteration % self.interval)
        ]


def temporary_name(checkpoint: Path) -> Path:
    """A path beside a checkpoint, for a directory that is no checkpoint yet, or no longer.

    Each call gives a new path: the writers of a killed process may still run and write to an old one.
    """
    return checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.tmp")


def publish(temporary: Path, checkpoint: Path, trackers: Iterable[Path]) -> None:
    """Gives a written directory its final name, then writes its iteration into the trackers, in their order.

    Everything is flushed to disk first, so that after a power failure no name exists without its content.
    """
    for path in [*(path for path in temporary.iterdir() if path.is_file()), temporary]:
        flush_to_disk(path)
    if checkpoint.exists():  # of a run that was killed before `latest` named it
        remove_checkpoint(checkpoint)
    temporary.replace(checkpoint)
    for tracker in trackers:
        with temporary_then_rename(tracker) as new:
            new.write_text(f"{iteration_of(checkpoint)}\n")
    # The directory alone is flushed, not its files:
    # closing the lock file there would release the lock (storage/locks.py).
    flush_to_disk(checkpoint.parent)


def iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))


def checkpoints_in(directory: Path) -> dict[int, Path]:
    return {
        iteration_of(path): path
        for path in directory.glob("iter_*")
        if re.fullmatch(r"iter_[0-9]{1,12}", path.name)
    }


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a directory iter_XXXXXXX as far as permissions allow. remove_leftovers tries again to remove
    the rest."""
    aside = temporary_name(checkpoint)
    checkpoint.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Removes directories and files that killed processes left incomplete. No process may be saving there."""
    remove_abandoned(directory)
    for leftover in directory.glob(".iter_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def free_bytes(directory: Path) -> int:
    """Free bytes on the file system of a directory, which need not exist yet."""
    return shutil.disk_usage(
        next(path for path in [directory, *directory.absolute().parents] if path.exists())
    ).free
