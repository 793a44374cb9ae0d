"""Check this project on this machine's GPU: devices, kernels, speed, memory, a small recipe; about 8 minutes.

    megatron-fuse check-gpu                                  # all checks, the most valuable first
    megatron-fuse check-gpu --only kernels benchmark         # some of them
    megatron-fuse check-gpu --device cpu --minutes 1         # the same code at tiny sizes, without a GPU

Needs no network, and no file from outside the repository. Prints a table. Writes the table to OUT/checks.md,
each row as a line of JSON to OUT/checks.jsonl, and the output of every check to OUT/CHECK.log. The exit code
is 1 if a check failed. docs/gpu.md explains the checks.
"""

import argparse
import os
from datetime import datetime
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.gpu_checks.catalogue import CHECKS, MINUTES
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [check.name for check in CHECKS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="CHECK", default=names, help=", ".join(names)
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="time limit for all checks together (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the results, empty or new; default: runs/check-gpu/ and the time",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: use tiny sizes and no limits on time"
    )


def run(options: argparse.Namespace) -> int:
    if not 0 < options.minutes <= 600:
        raise UserError(f"--minutes is {options.minutes:g}, but it must be above 0 and at most 600")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for a GPU
    with importing():
        import torch

        from megatron_fuse.gpu_checks import markdown
        from megatron_fuse.gpu_checks.kernel_benchmarks import require_repository
        from megatron_fuse.gpu_checks.runner import run_checks
    require_repository()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU. Use --device cpu to run the same code at tiny sizes.")
    output = options.out or Path("runs/check-gpu") / datetime.now().strftime("%Y%m%d-%H%M%S")
    chosen = [check for check in CHECKS if check.name in options.only]
    rows = run_checks(chosen, device=options.device, minutes=options.minutes, output=output)
    say(f"\n{markdown(rows)}\nwritten to {output}")
    return int(any(row.ok is False for row in rows))
