"""What is told of a run: the rows of the CSV file, and a table with ratios and targets."""

import csv
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from cases import MODES, Case, Target
from measure import Result, percentiles

BASELINES = ("dense eager", "torch topk, logsumexp")
COLUMNS = (
    *("kernel", "provider", "mode", "dtype", "n", "v", "k", "temperature", "h"),
    *("p20_ms", "p50_ms", "p80_ms", "gb_per_s", "peak_mb", "machine", "versions", "date", "note"),
)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        "thread(s)"
    )


def versions(device: str) -> str:
    named = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        named["cuda"] = torch.version.cuda
    for package in ("triton", "liger-kernel"):
        try:
            named[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(f"{name} {version}" for name, version in named.items())


def result_rows(case: Case, results: Sequence[Result]) -> list[dict]:
    """A row for every provider and mode, without figures where there are none.

    MB and GB are powers of ten.
    """
    shape = {"kernel": case.label, "dtype": str(case.dtype).removeprefix("torch."), "n": case.n, "v": case.v}
    shape |= {"k": case.k, "temperature": case.temperature, "h": case.h}
    rows = []
    for result in results:
        for mode in case.modes:
            row = shape | {"provider": result.provider, "mode": mode, "note": result.note}
            if result.milliseconds:
                row |= _timed(result.milliseconds[mode], case.model_bytes(mode))
                row["peak_mb"] = round(result.peak_bytes[mode] / 1e6, 2)
            rows.append(row)
    return rows


def copy_row(times: Sequence[float], size: int) -> dict:
    """The copy rate of the same run, read + written: the floor of what is bound by memory."""
    return {"kernel": "copy", "provider": "torch copy_", "mode": "copy"} | _timed(
        percentiles(times), 2 * size
    )


def _timed(percentiles: tuple[float, float, float], moved: int) -> dict:
    figures = dict(zip(("p20_ms", "p50_ms", "p80_ms"), (round(ms, 5) for ms in percentiles), strict=True))
    return figures | {"gb_per_s": round(moved / percentiles[1] / 1e6, 2)}


def append_csv(path: Path, rows: Sequence[dict], device: str) -> None:
    """Adds the rows, with machine, versions and date. ValueError where the file has other columns."""
    same = {
        "machine": machine(device),
        "versions": versions(device),
        "date": datetime.now(UTC).date().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = file.readline().strip()
        writer = csv.DictWriter(file, COLUMNS)
        if not header:
            writer.writeheader()
        elif header != ",".join(COLUMNS):
            raise ValueError(
                f"{path} has the columns {header}, but the rows have {','.join(COLUMNS)}. Move the file away."
            )
        writer.writerows(row | same for row in rows)


def print_table(case: Case, results: Sequence[Result], copy_rate: float) -> None:
    """copy_rate: GB/s. The column "of copy" is the share of it that a call reaches."""
    whole = case.modes[-1]
    baseline = next((r for r in results if r.provider in BASELINES and r.milliseconds), None)
    print(f"\n{case}; ratio: {baseline.provider if baseline else BASELINES[0]} / provider, of {whole}")
    heads = (
        "forward ms",
        "backward ms",
        "both p50",
        "p20",
        "p80",
        "ratio",
        "GB/s",
        "of copy",
        "peak MB",
        "/ logits",
    )
    print(f"{'':32}" + "".join(f"{head:>12}" for head in heads))
    for result in results:
        if not result.milliseconds:
            print(f"{result.provider:32}  {result.note}")
            continue
        p20, p50, p80 = result.milliseconds[whole]
        ratio = f"{baseline.milliseconds[whole][1] / p50:.2f}" if baseline else "-"
        rate, peak = case.model_bytes(whole) / p50 / 1e6, result.peak_bytes[whole]
        parts = [f"{result.milliseconds[mode][1]:.3f}" if mode in case.modes else "-" for mode in MODES[:2]]
        both = [f"{ms:.3f}" for ms in (p50, p20, p80)]
        memory = [f"{peak / 1e6:.1f}", f"{peak / case.logits_bytes:.2f}"]
        line = (*parts, *both, ratio, f"{rate:.1f}", f"{rate / copy_rate:.0%}", *memory)
        print(f"{result.provider:32}" + "".join(f"{value:>12}" for value in line), flush=True)


@dataclass(frozen=True)
class Verdict:
    """Of one target of a case: what was measured, None where provider or baseline have no figures."""

    target: Target
    value: float | None

    @property
    def missed(self) -> bool:
        return self.value is not None and not self.value <= self.target.at_most


def verdicts(case: Case, results: Sequence[Result], copy_rate: float) -> list[Verdict]:
    """Of every target. copy_rate: bytes read and written in a second."""
    figures = {result.provider: result for result in results if result.milliseconds}
    return [Verdict(target, _value(case, target, figures, copy_rate)) for target in case.targets]


def _value(case: Case, target: Target, figures: Mapping[str, Result], copy_rate: float) -> float | None:
    if not {target.provider, target.against} - {"", "logits", "pass"} <= figures.keys():
        return None
    figure = _figure(case, figures[target.provider], target.figure)
    if target.against == "":
        return figure
    if target.against == "logits":
        return figure / (case.logits_bytes / 1e6)
    if target.against == "pass":
        return figure / (case.logits_bytes / copy_rate * 1e3)
    return figure / _figure(case, figures[target.against], target.figure)


def _figure(case: Case, result: Result, name: str) -> float:
    whole = case.modes[-1]
    return result.milliseconds[whole][1] if name == "p50_ms" else result.peak_bytes[whole] / 1e6


def print_verdicts(found: Sequence[Verdict]) -> None:
    for verdict in found:
        if verdict.value is None:
            print(f"  {verdict.target}: open, not measured")
        else:
            holds = "MISSED" if verdict.missed else "holds"
            print(f"  {verdict.target}: {verdict.value:.3f}, at most {verdict.target.at_most:.3f}: {holds}")
