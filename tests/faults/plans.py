"""Artifacts of `run_plan` and `run_plans` alone: their shards cost milliseconds, so that hundreds of races
take seconds.
"""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import Server
from targets import Target

SHARDS = 10


def make_artifact(directory: Path) -> None:
    """Shards of two files, one of them in a directory's worth of small writes, at a pace that changes from
    process to process.
    """
    from megatron_fuse.storage import Plan, run_plan

    pace = random.Random()

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        return _write(index, prefix, pace)

    run_plan(Plan(directory / "one", "toy", {"seed": 1}, {"data": "0" * 64}, SHARDS), make_shard)


def make_artifacts(directory: Path) -> None:
    """Two artifacts that share their shards' work."""
    from megatron_fuse.storage import Plan, run_plans

    pace = random.Random()
    plans = {
        name: Plan(directory / name, "toy", {"seed": 1, "name": name}, {}, SHARDS) for name in ("one", "two")
    }

    def make_shards(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        return {name: _write(index, prefix, pace) for name, prefix in prefixes.items()}

    run_plans(plans, make_shards)


def read_artifacts(directory: Path, output: Path) -> None:
    """A later stage: all that the artifacts hold, in one file; refuses what is not whole."""
    from megatron_fuse.storage import open_artifact, write_jsonl

    rows = []
    for place in sorted(path for path in directory.iterdir() if path.is_dir()):
        artifact = open_artifact(place, "toy", "this test")
        for path in artifact.files(".jsonl") + artifact.files(".bin"):
            rows.append({"name": path.name, "content": artifact.checked(path).read_bytes().hex()})
        rows.append({"counts": artifact.counts})
    write_jsonl(output / "all.jsonl", rows)


def _write(index: int, prefix: Path, pace: random.Random) -> dict[str, int]:
    from megatron_fuse.storage import temporary_then_rename, write_jsonl

    content = random.Random(index)
    write_jsonl(Path(f"{prefix}.rows.jsonl"), [{"row": row, "value": content.random()} for row in range(20)])
    with temporary_then_rename(Path(f"{prefix}.bin")) as temporary, temporary.open("wb") as file:
        for _ in range(5):
            file.write(content.randbytes(200))
            file.flush()
            time.sleep(pace.uniform(0, 0.001))
    return {"rows": 20, "bytes": 1000}


def _exit_code(function: object, *arguments: Path) -> None:
    from megatron_fuse.errors import exit_code

    raise SystemExit(exit_code(lambda: function(*arguments)))  # type: ignore[operator]


BY_CLAIM = {"MEGATRON_FUSE_CLAIM": "0.3"}
# How the processes of a target take shards: all by lock, all by claim, or each as it likes.
MANNERS: dict[str, Sequence[Mapping[str, str]]] = {
    "": ({},),
    " by claim": (BY_CLAIM,),
    " by either": (BY_CLAIM, {}),
}


def plan_targets(server: Server, root: Path) -> dict[str, Target]:
    """Both functions in every manner, run once."""
    return {
        f"{function}{manner}": _plan_target(server, root, function, manner)
        for manner in MANNERS
        for function in ("run_plan", "run_plans")
    }


def _plan_target(server: Server, root: Path, name: str, manner: str) -> Target:
    function = make_artifact if name == "run_plan" else make_artifacts
    name += manner
    under, scratch = root / name, root / f"{name}-scratch"
    for directory in (under / "artifacts", under / "read", scratch):
        directory.mkdir(parents=True)

    def target(name: str, function: object, directory: Path, *more: Path, **options: Any) -> Target:
        return Target(
            name, _exit_code, (function, *more), directory, under, scratch, server, **options
        ).learn()

    made = target(name, function, under / "artifacts", under / "artifacts", environments=MANNERS[manner])
    made.reader = target(
        f"{name}'s reader", read_artifacts, under / "read", under / "artifacts", under / "read"
    )
    return made
