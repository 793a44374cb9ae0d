"""How a stage writes its artefact: shard by shard, shared between ranks, resumed where it was cut off."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.storage.artefact import Artefact, Plan, completed
from megatron_fuse.storage.files import read_json, remove_abandoned, sha256_of_file, write_json


def rank_and_world() -> tuple[int, int]:
    """This process's share of the work under torchrun: it takes every w-th shard from the r-th on."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


MakeShard = Callable[[int, Path], dict[str, int]]


def run_plan(plan: Plan, make_shard: MakeShard, progress: Callable[[str], None] = print) -> Artefact | None:
    """Makes the missing shards of this rank, then the manifest if every shard is there.

    make_shard(index, prefix) writes files named `prefix.<suffix>` (through a temporary name of its own or not: a shard without
    marker is made again) and returns counts, which are added up in the manifest. Returns the artefact, None while other ranks
    still work on theirs.
    """
    artefact = completed(plan)
    if artefact:
        return artefact
    directory = plan.directory
    write_json(directory / "plan.json", plan.content())
    rank, world_size = rank_and_world()
    names = plan.names()
    for index in range(rank, len(names), world_size):
        marker = directory / f"{names[index]}.done"
        if marker.exists():
            continue
        _remove_files(directory, names[index])
        try:
            counts = make_shard(index, directory / names[index])
        except Exception:
            _forget(plan, names[index])
            raise
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in sorted(directory.glob(f"{names[index]}.*"))
        }
        if not (directory / "plan.json").exists():  # another rank failed at its first shard
            write_json(directory / "plan.json", plan.content())
        write_json(marker, {"files": files, "counts": counts})
        done = sum((directory / f"{name}.done").exists() for name in names)
        progress(f"{directory}: shard {done}/{len(names)}")
    return _finish(plan)


def _remove_files(directory: Path, shard: str) -> None:
    """Data files of a shard without marker, whole or temporary."""
    for leftover in directory.glob(f"*{shard}.*"):
        leftover.unlink()


def _forget(plan: Plan, shard: str) -> None:
    """After an error: leaves nothing half-written, and no plan that would bind a mended rerun while no shard is done."""
    _remove_files(plan.directory, shard)
    if not any((plan.directory / f"{name}.done").exists() for name in plan.names()):
        (plan.directory / "plan.json").unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another rank is still at work
            plan.directory.rmdir()


def _finish(plan: Plan) -> Artefact | None:
    markers = [plan.directory / f"{name}.done" for name in plan.names()]
    if not all(marker.exists() for marker in markers):
        return None
    files: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for marker in markers:
        content = read_json(marker)
        files |= content["files"]
        for key, value in content["counts"].items():
            counts[key] = counts.get(key, 0) + value
    manifest = {**plan.content(), "counts": counts, "files": files}
    remove_abandoned(plan.directory)  # of plan.json and manifest.json: those of shards are gone
    write_json(plan.directory / "manifest.json", manifest)
    return Artefact(plan.directory, manifest)


def shard_bounds(items: int, shard_size: int) -> np.ndarray:
    """[shards + 1] first item of every shard, and the number of items at the end. At least one shard, even of nothing."""
    return np.unique(np.append(np.arange(0, max(items, 1), shard_size), items)) if items else np.array([0, 0])
