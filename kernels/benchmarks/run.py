"""The kernels beside what others do, in one run; on a GPU where there is one, else on the CPU.

    python kernels/benchmarks/run.py --csv kernels/benchmarks/results/cpu.csv --plots \
        kernels/benchmarks/results
    python kernels/benchmarks/run.py --quick                       # everything once, on small shapes
    python kernels/benchmarks/run.py --only "sparse_kl 8192 x 32000" --providers ours "dense eager"

Prints a table for each case, with the targets that ours is held to, and adds its rows to the CSV file as soon
as they are known. Exits with 1 where a provider is wrong or a target is missed; one that needs more memory
than there is, is a row that says so. Others' packages are measured where they are installed: liger-kernel
(0.8.5 was read).
"""

import argparse
import sys
from pathlib import Path

import torch
from cases import cpu_cases, gpu_cases, quick_cases
from lineup import providers_of
from measure import measure
from plots import draw
from report import append_csv, copy_row, machine, print_table, print_verdicts, result_rows, verdicts, versions
from timing import CpuMeter, CudaMeter, copy_times


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    device = options.device
    every_case = quick_cases() if options.quick else gpu_cases() if device == "cuda" else cpu_cases()
    cases = [case for case in every_case if options.only in str(case)]
    if not cases:
        sys.exit(
            f"--only {options.only!r} is not in the heading of a case:\n  "
            + "\n  ".join(map(str, every_case))
        )
    meter = CudaMeter() if device == "cuda" else CpuMeter()
    size = (1 << 20) if options.quick else (1 << 30) if device == "cuda" else (1 << 28)

    print(f"{machine(device)}; {versions(device)}")
    copied = copy_row(copy_times(meter, device, size, repeats=9), size)
    print(f"copy rate, read + written: {copied['gb_per_s']:.1f} GB/s")
    if options.csv:
        append_csv(options.csv, [copied], device)

    succeeded = True
    for case in cases:
        providers = [
            p for p in providers_of(case, device) if not options.providers or p.name in options.providers
        ]
        results = measure(case, providers, meter, device, options.repeats or case.repeats)
        print_table(case, results, copied["gb_per_s"])
        found = verdicts(case, results, 1e9 * copied["gb_per_s"])
        print_verdicts(found)
        succeeded &= not any(each.missed for each in found) and not any(result.failed for result in results)
        if options.csv:
            append_csv(options.csv, result_rows(case, results), device)
    if options.plots:
        draw(options.csv, options.plots)
    return 0 if succeeded else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, help="CSV file that the rows are added to")
    parser.add_argument("--plots", type=Path, help="directory for plots of the rows in the CSV file")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and two calls, only to show that everything runs"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="measure only cases whose heading contains TEXT"
    )
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="measure only these providers")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed calls of each provider, at least 2; default: the number of the case",
    )
    options = parser.parse_args()
    known = {provider.name for case in quick_cases() for provider in providers_of(case, options.device)}
    unknown = set(options.providers or ()) - known
    if unknown:
        parser.error(f"--providers: {sorted(unknown)} are not known. Choose from {sorted(known)}.")
    if options.plots and not options.csv:
        parser.error("--plots needs --csv: it draws the rows of that file")
    if options.repeats is not None and options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}, but percentiles need at least 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
