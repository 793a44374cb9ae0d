"""What taking shards by claim costs over fixed ranks, and what it saves beside a slow machine.

    python benchmarks/claims_speed.py [--shards 32] [--seconds 0.5]

Four processes make an artifact of equal shards by `run_plan`, with files of a megabyte. The work of a shard
is a wait, as for a device: on fewer cores than processes, the processes would slow each other otherwise.
Baseline: the same four processes as the ranks of torchrun, which have every fourth shard each. The time is
that of the last process to end.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

from table import Measurement, medians_in_turns, run

from megatron_fuse.claiming import DEFAULT_LEASE, LEASE
from megatron_fuse.storage import Plan, completed, run_plan

_PROCESSES = 4
_BYTES = b"0" * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, default=32, help="number of equal shards")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds that a shard takes")
    parser.add_argument("--repeats", type=int, default=3, help="measurements by turns; the median counts")


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The project wants claims to cost at most 2 % with equal processes, and to be at least 1.5 times as fast
    if one of the four needs three times as long.
    """
    by_claim, by_rank = medians_in_turns(
        options.repeats, partial(_make, options, claim=True), partial(_make, options, claim=False)
    )
    slow_by_claim, slow_by_rank = medians_in_turns(
        options.repeats,
        partial(_make, options, claim=True, slowed=3),
        partial(_make, options, claim=False, slowed=3),
    )
    return [
        Measurement("4 processes by claim", by_claim, "s", "4 fixed ranks", by_rank, "ratio <= 1.02"),
        Measurement(
            "by claim, one slowed to a third",
            options.shards / slow_by_claim,
            "shards/s",
            "4 fixed ranks",
            options.shards / slow_by_rank,
            "ratio >= 1.5",
        ),
    ]


def _make(options: argparse.Namespace, *, claim: bool, slowed: float = 1) -> None:
    """slowed: how many times as long the last process needs for a shard."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        plan = Plan(Path(directory) / "artifact", "benchmark", {}, {}, options.shards)
        context = multiprocessing.get_context("fork")
        barrier = context.Barrier(_PROCESSES)
        processes = [
            context.Process(
                target=_work,
                args=(
                    plan,
                    rank,
                    claim,
                    options.seconds * (slowed if rank == _PROCESSES - 1 else 1),
                    barrier,
                ),
            )
            for rank in range(_PROCESSES)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        made = completed(plan)
        if made is None or any(process.exitcode for process in processes):
            raise RuntimeError("the artifact is not whole")


def _work(plan: Plan, rank: int, claim: bool, seconds: float, barrier: Barrier) -> None:
    if claim:
        os.environ[LEASE] = str(DEFAULT_LEASE)
    else:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(_PROCESSES)}
    barrier.wait()

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        time.sleep(seconds)
        Path(f"{prefix}.bin").write_bytes(_BYTES)
        return {"bytes": len(_BYTES)}

    run_plan(plan, make_shard)


if __name__ == "__main__":
    sys.exit(run(__doc__ or "", add_arguments, measure))
