"""The benchmarks of training in one command, each in a process of its own.

    python benchmarks/training.py --tokenizer LLAMA2 --instructions GPT4.jsonl \
        --csv docs/benchmarks/training.csv --plot docs/benchmarks/training_step.png

LLAMA2 is a tokenizer's file. About ten minutes on two cores; exits with 1 where a figure misses what is
wanted.
"""

import argparse
from pathlib import Path

from table import run_all

# file -> its inputs by flag, and its threads
BENCHMARKS = {
    "training_step.py": ({"--plot": "plot"}, 2),
    "attention_packing.py": ({"--target-tokenizer": "tokenizer", "--instructions": "instructions"}, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument(
        "--plot",
        type=Path,
        required=True,
        help="PNG file for the plot of steps over vocabularies and entries",
    )
    return run_all(parser, BENCHMARKS)


if __name__ == "__main__":
    raise SystemExit(main())
