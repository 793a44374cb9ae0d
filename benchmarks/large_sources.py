"""The benchmarks of sources of any size in one command, each in a process of its own.

    python benchmarks/large_sources.py --source-tokenizer LLAMA2 --instructions GPT4.jsonl \
        --csv docs/benchmarks/large_sources.csv

LLAMA2 is a tokenizer's file. About six minutes on two cores; exits with 1 where a figure misses what is
wanted.
"""

import argparse
import sys
from pathlib import Path

from table import run_all

# file -> its inputs by flag, and its threads
BENCHMARKS = {
    "megatron_capture.py": (
        {
            "--source-tokenizer": "source_tokenizer",
            "--instructions": "instructions",
            "--examples": "examples",
            "--repeats": "repeats",
        },
        1,
    ),
    "claims_speed.py": ({}, 1),
    "export_memory.py": ({}, 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("source_tokenizer", "instructions"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=12, help="instructions that a capture reads")
    parser.add_argument("--repeats", type=int, default=2, help="captures of each kind, in turns")
    return run_all(parser, BENCHMARKS)


if __name__ == "__main__":
    sys.exit(main())
