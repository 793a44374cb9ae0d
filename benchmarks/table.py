"""What every benchmark reports: a figure beside a named baseline of the same run, as a table and as rows
of one CSV file.
"""

import argparse
import csv
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import torch

from megatron_fuse.errors import exit_code
from megatron_fuse.processes import run_tied


@dataclass(frozen=True)
class Measurement:
    """`value` and `baseline` in `unit`. ratio = value / baseline.

    `wanted`: the condition that the project holds itself to.
    """

    name: str
    value: float
    unit: str
    baseline_name: str = ""
    baseline: float | None = None
    wanted: str = ""  # ">= 150000", "ratio >= 300", "<= 33"

    @property
    def ratio(self) -> float | None:
        return self.value / self.baseline if self.baseline else None

    @property
    def holds(self) -> bool | None:
        """Whether what is wanted was measured; None where nothing is."""
        if not self.wanted:
            return None
        *subject, comparison, bound = self.wanted.split()
        figure = self.ratio if subject else self.value
        return figure >= float(bound) if comparison == ">=" else figure <= float(bound)


def run(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    measure: Callable[[argparse.Namespace], list[Measurement]],
) -> int:
    """A benchmark's command line: measures, prints, adds to --csv.

    Returns 1 where something wanted was missed.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--csv", type=Path, help="file that the rows are added to")
    options = parser.parse_args()

    def main() -> int:
        measurements = measure(options)
        print_table(measurements)
        if options.csv:
            append_csv(options.csv, measurements)
        return int(any(m.holds is False for m in measurements))

    return exit_code(main)


def run_all(parser: argparse.ArgumentParser, benchmarks: Mapping[str, tuple[Mapping[str, str], int]]) -> int:
    """A command line over several benchmarks, each in a process of its own. Returns 1 where one missed
    something or failed.

    benchmarks: file beside this one -> the parser's arguments by the benchmark's own flags, and its threads.
    """
    parser.add_argument("--csv", type=Path, help="file that the rows are added to")
    parser.add_argument("--only", choices=benchmarks, nargs="+", default=list(benchmarks))
    options = parser.parse_args()
    return exit_code(partial(_run_each, options, benchmarks))


def _run_each(options: argparse.Namespace, benchmarks: Mapping[str, tuple[Mapping[str, str], int]]) -> int:
    failed = []
    for file in options.only:
        inputs, threads = benchmarks[file]
        command = [sys.executable, str(Path(__file__).with_name(file))]
        for flag, name in {**inputs, **({"--csv": "csv"} if options.csv else {})}.items():
            command += [flag, str(getattr(options, name))]
        print(f"\n{file}, {threads} thread{'s' * (threads > 1)}", flush=True)
        if run_tied(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}):
            failed.append(file)
    print(f"\nmissed or failed: {', '.join(failed)}" if failed else "\nall that is wanted holds")
    return int(bool(failed))


def medians_in_turns(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each, all taken in turns, so that a slow spell of the machine meets all of them."""
    turns = []
    for _ in range(repeats):
        seconds = []
        for work in works:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        turns.append(seconds)
    return [median(of_one) for of_one in zip(*turns, strict=True)]


def print_table(measurements: Sequence[Measurement]) -> None:
    width = max(len(m.name) for m in measurements)
    for m in measurements:
        against = f"{m.ratio:10.4g} x  {m.baseline_name} ({m.baseline:,.6g})" if m.ratio is not None else ""
        verdict = {None: "", True: f"  [{m.wanted}: holds]", False: f"  [{m.wanted}: MISSED]"}[m.holds]
        print(f"{m.name:<{width}}  {m.value:>14,.6g} {m.unit:<16}{against}{verdict}", flush=True)


def append_csv(path: Path, measurements: Sequence[Measurement]) -> None:
    """Adds the rows to a CSV file, with the day and the machine."""
    machine = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    rows = [machine | asdict(m) | {"ratio": m.ratio, "holds": m.holds} for m in measurements]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)
