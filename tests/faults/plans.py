"""Artifacts of `run_plan` and `run_plans` alone: their shards cost milliseconds, so that hundreds of races
take seconds.
"""

import random
import time
from pathlib import Path

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


def plan_targets(server: Server, root: Path) -> dict[str, Target]:
    """The two, run once."""
    targets = {}
    for function in (make_artifact, make_artifacts):
        name = "run_plan" if function is make_artifact else "run_plans"
        under, scratch = root / name, root / f"{name}-scratch"
        for directory in (under / "artifacts", under / "read", scratch):
            directory.mkdir(parents=True)

        def target(name: str, function: object, directory: Path, *more: Path, of=(under, scratch)) -> Target:  # type: ignore[no-untyped-def]
            return Target(name, _exit_code, (function, *more), directory, of[0], of[1], server)

        made = target(name, function, under / "artifacts", under / "artifacts").learn()
        reader = target(
            f"{name}'s reader", read_artifacts, under / "read", under / "artifacts", under / "read"
        )
        made.reader = reader.learn()
        targets[name] = made
    return targets
