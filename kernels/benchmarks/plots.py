"""Plots of a benchmark's CSV file.

    python kernels/benchmarks/plots.py kernels/benchmarks/results/cpu.csv --to kernels/benchmarks/results

<csv's name>_<kernel>.png: time and peak memory of each kernel's first case, by provider; <csv's
name>_vocabulary.png: time over the vocabulary. Where the file holds a measurement more than once, the newest
counts.
"""

import argparse
import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SHAPE = ("kernel", "dtype", "n", "v", "k", "temperature", "h")
_WITHOUT_VOCABULARY = tuple(name for name in _SHAPE if name != "v")


def draw(path: Path, folder: Path) -> list[Path]:
    """Returns the files that it wrote. ValueError where there is nothing to draw."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    copies = [row for row in rows if row["mode"] == "copy"]
    timed = {
        (row["provider"], *_of(row, _SHAPE)): row
        for row in rows
        if row["mode"] == "forward+backward" and row["p50_ms"]
    }
    if not timed or not copies:
        raise ValueError(
            f"{path} has no timed forward+backward, or no copy rate. Run kernels/benchmarks/run.py."
        )
    rate = float(copies[-1]["gb_per_s"])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kernel in dict.fromkeys(row["kernel"] for row in timed.values()):
        of_kernel = [row for row in timed.values() if row["kernel"] == kernel]
        first = [row for row in of_kernel if _of(row, _SHAPE) == _of(of_kernel[0], _SHAPE)]
        written.append(folder / f"{path.stem}_{kernel}.png")
        _bars(first, rate).savefig(written[-1], dpi=120)
        alike = [
            row
            for row in of_kernel
            if _of(row, _WITHOUT_VOCABULARY) == _of(of_kernel[0], _WITHOUT_VOCABULARY)
        ]
        if len({row["v"] for row in alike}) > 1:
            written.append(folder / f"{path.stem}_vocabulary.png")
            _over_vocabulary(alike, rate).savefig(written[-1], dpi=120)
    return written


def _of(row: dict, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(row[name] for name in names)


def _title(row: dict, rows_and_columns: str) -> str:
    hidden = f", h={row['h']}" if row["h"] else ""
    shape = f"{rows_and_columns}{hidden}, k={row['k']}, T={float(row['temperature']):g}, {row['dtype']}"
    return f"{row['kernel']}, forward + backward, {shape}\n{row['machine']}, {row['date']}"


def _floor(row: dict, rate: float) -> float:
    """Milliseconds for the model bytes at the copy rate (GB/s)."""
    return float(row["gb_per_s"]) * float(row["p50_ms"]) / rate


def _bars(rows: list[dict], rate: float) -> Figure:
    figure = Figure(figsize=(11, 1.5 + 0.45 * len(rows)), layout="constrained")
    figure.suptitle(_title(rows[0], f"{rows[0]['n']} x {rows[0]['v']}"), fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["provider"] for row in rows]
    colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
    _bar(left, names, [float(row["p50_ms"]) for row in rows], colours, "ms (median; line: p20 to p80)")
    left.errorbar([float(r["p50_ms"]) for r in rows], names, xerr=_spread(rows), fmt="none", ecolor="black")
    if rows[0]["kernel"] == "sparse_kl":  # the other is bound by arithmetic
        left.axvline(_floor(rows[0], rate), color="black", linestyle="--", label=f"floor at {rate:.0f} GB/s")
        left.legend(fontsize=8)
    _bar(right, names, [float(row["peak_mb"]) for row in rows], colours, "peak memory above the inputs, MB")
    left.invert_yaxis()
    return figure


def _bar(axes: Axes, names: list[str], values: list[float], colours: list[str], label: str) -> None:
    axes.bar_label(axes.barh(names, values, color=colours), fmt="{:.4g}", padding=6, fontsize=8)
    axes.margins(x=0.18)
    axes.set_xlabel(label)


def _spread(rows: list[dict]) -> tuple[list[float], list[float]]:
    """Distances of p20 and p80 from the median."""
    below = [float(row["p50_ms"]) - float(row["p20_ms"]) for row in rows]
    return below, [float(row["p80_ms"]) - float(row["p50_ms"]) for row in rows]


def _over_vocabulary(rows: list[dict], rate: float) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["provider"] for row in rows):
        mine = sorted((row for row in rows if row["provider"] == name), key=lambda row: int(row["v"]))
        width = 2.5 if name.startswith("ours") else 1.2
        sizes, medians = [int(row["v"]) for row in mine], [float(row["p50_ms"]) for row in mine]
        axes.errorbar(
            sizes, medians, yerr=_spread(mine), marker="o", markersize=3, linewidth=width, label=name
        )
    floor = sorted({int(row["v"]): _floor(row, rate) for row in rows}.items())
    axes.plot(*zip(*floor, strict=True), "k--", label=f"floor at {rate:.0f} GB/s")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="vocabulary",
        ylabel="ms",
        title=_title(rows[0], f"{rows[0]['n']} rows"),
    )
    axes.set_xticks([size for size, _ in floor], [str(size) for size, _ in floor], fontsize=8)
    axes.minorticks_off()
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="folder")
    options = parser.parse_args()
    for path in draw(options.csv, options.to):
        print(path)


if __name__ == "__main__":
    main()
