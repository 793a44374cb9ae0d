"""The kernels beside what others do, in one run; on a GPU where there is one, else on the CPU.

    python kernels/benchmarks/run.py --csv kernels/benchmarks/results/cpu.csv --plots kernels/benchmarks/results
    python kernels/benchmarks/run.py --quick                       # everything once, on small shapes
    python kernels/benchmarks/run.py --only "sparse_kl 8192 x 32000" --providers ours "dense eager"

Prints a table for each case, with the targets that ours is held to, and adds its rows to the CSV file as soon as they are
known. Exits with 1 where a provider is wrong or a target is missed. Others' packages are measured where they are installed:
liger-kernel (0.6.4 was read).
"""

import argparse
import sys
from pathlib import Path

import torch
from cases import Case, cpu_cases, gpu_cases, quick_cases
from linear_providers import fused_linear_providers
from measure import measure
from plots import draw
from providers import Provider, sparse_kl_providers
from report import append_csv, check_targets, copy_row, machine, print_table, result_rows, versions
from timing import CpuMeter, CudaMeter, copy_times


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    device = options.device
    every_case = quick_cases() if options.quick else gpu_cases() if device == "cuda" else cpu_cases()
    cases = [case for case in every_case if options.only in str(case)]
    if not cases:
        sys.exit(f"--only {options.only!r} is in none of:\n  " + "\n  ".join(map(str, every_case)))
    meter = CudaMeter() if device == "cuda" else CpuMeter()
    size = (1 << 20) if options.quick else (1 << 30) if device == "cuda" else (1 << 28)

    print(f"{machine(device)}; {versions(device)}")
    copied = copy_row(copy_times(meter, device, size, repeats=9), size)
    print(f"copy rate, read + written: {copied['gb_per_s']:.1f} GB/s")
    if options.csv:
        append_csv(options.csv, [copied], device)

    succeeded = True
    for case in cases:
        providers = [p for p in providers_of(case, device) if not options.providers or p.name in options.providers]
        results = measure(case, providers, meter, device, options.repeats or case.repeats)
        print_table(case, results, copied["gb_per_s"])
        succeeded &= check_targets(case, results, device) and not any(result.failed for result in results)
        if options.csv:
            append_csv(options.csv, result_rows(case, results), device)
    if options.plots:
        draw(options.csv, options.plots)
    return 0 if succeeded else 1


def providers_of(case: Case, device: str) -> list[Provider]:
    return fused_linear_providers() if case.kernel == "fused_linear" else sparse_kl_providers(device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="file that the rows are added to")
    parser.add_argument("--plots", type=Path, help="folder for plots of what the CSV file then holds")
    parser.add_argument("--quick", action="store_true", help="small shapes, two calls: shows that everything runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose heading contains it")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument(
        "--repeats", type=int, help="timed calls of each provider, at least 2, instead of the case's own number"
    )
    options = parser.parse_args()
    known = {p.name for p in (*sparse_kl_providers(options.device), *fused_linear_providers())}
    unknown = set(options.providers or ()) - known
    if unknown:
        parser.error(f"--providers has {sorted(unknown)}: the names are {sorted(known)}")
    if options.plots and not options.csv:
        parser.error("--plots draws from the file that --csv names")
    if options.repeats is not None and options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}: percentiles need at least 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
