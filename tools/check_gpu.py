"""Check this project on this machine's GPU: devices, kernels, speed, memory, a whole small recipe; about 8 minutes.

    python tools/check_gpu.py                                  # all checks, the most valuable first
    python tools/check_gpu.py --only kernels benchmark         # some of them
    python tools/check_gpu.py --device cpu --minutes 1         # the same code at tiny sizes, without a GPU

Needs no file from outside the repository and no network. Prints a table, and writes it to OUT/checks.md, each row as a line of JSON
to OUT/checks.jsonl, and what every check prints to OUT/CHECK.log. Exits with 1 if a check failed. docs/gpu.md explains the checks.
"""

import argparse
import os
from datetime import datetime
from pathlib import Path

import megatron_fuse.start  # noqa: F401
from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.gpu_checks import CHECKS, MINUTES, markdown, run_checks
from megatron_fuse.text_safety import say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHECK", default=names, help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all checks together (%(default)s)")
    parser.add_argument("--out", type=Path, help="an empty directory; default: runs/check-gpu/ and the time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, no limits on time")
    options = parser.parse_args()
    if not 0 < options.minutes <= 600:
        parser.error(f"--minutes is {options.minutes:g}: it must be above 0, and 600 at most")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for a GPU
    else:
        require_gpu()
    output = options.out or Path("runs/check-gpu") / datetime.now().strftime("%Y%m%d-%H%M%S")
    chosen = [check for check in CHECKS if check.name in options.only]
    rows = run_checks(chosen, device=options.device, minutes=options.minutes, output=output)
    say(f"\n{markdown(rows)}\nwritten to {output}")
    return int(any(row.ok is False for row in rows))


def require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to torch: --device cpu runs the same code at tiny sizes")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
