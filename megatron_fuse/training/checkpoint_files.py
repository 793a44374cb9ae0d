"""How a checkpoint's directory comes and goes, as one process does it: by renaming, so that half of one never looks whole."""

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
    """The newest `last` checkpoints stay, and those at multiples of `interval`; with neither given, all.

    With only `interval` the newest stays besides, as with Megatron-LM's --save-retain-interval.
    """

    last: int | None = None
    interval: int | None = None

    def expired(self, iterations: Iterable[int], newest: int, named: Iterable[int | None]) -> list[int]:
        """Those of the checkpoints at `iterations` that are to go once `newest` is whole.

        named: the best and the latest, which stay. So do checkpoints after `newest`, of a run that went further before, and
        iteration 0, which holds imported weights.
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
    """A place beside a checkpoint for what is not one yet, or no longer.

    New at each call: the writers of a process that was killed may live on, and write where they were told to.
    """
    return checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.tmp")


def publish(temporary: Path, checkpoint: Path, trackers: Iterable[Path]) -> None:
    """Gives a written directory its name, then writes that iteration into the trackers, in their order.

    All is brought to disk before, so that a name never outlives a power failure that its content did not.
    """
    for path in [*(path for path in temporary.iterdir() if path.is_file()), temporary]:
        flush_to_disk(path)
    if checkpoint.exists():  # of a run that was killed before `latest` named it
        remove_checkpoint(checkpoint)
    temporary.replace(checkpoint)
    for tracker in trackers:
        with temporary_then_rename(tracker) as new:
            new.write_text(f"{iteration_of(checkpoint)}\n")
    # Not its files: closing the lock that lies there would release it (storage/locks.py).
    flush_to_disk(checkpoint.parent)


def iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))


def checkpoints_in(directory: Path) -> dict[int, Path]:
    return {
        iteration_of(path): path for path in directory.glob("iter_*") if re.fullmatch(r"iter_[0-9]{1,12}", path.name)
    }


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a directory iter_XXXXXXX as far as permissions go; remove_leftovers tries the rest again."""
    aside = temporary_name(checkpoint)
    checkpoint.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes left half-written or half-deleted. Nobody may be saving there."""
    remove_abandoned(directory)
    for leftover in directory.glob(".iter_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def free_bytes(directory: Path) -> int:
    """On the file system where a directory is, or would be made."""
    return shutil.disk_usage(next(path for path in [directory, *directory.absolute().parents] if path.exists())).free
