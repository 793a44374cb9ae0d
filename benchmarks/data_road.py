"""The data road's benchmarks in one command, each in a process of its own.

    python benchmarks/data_road.py --target-tokenizer LLAMA2 --source-tokenizer GPT_NEOX \
        --large-target-tokenizer CL100K --instructions GPT4.jsonl --csv docs/benchmarks/data_road.csv

LLAMA2 and the others are files or directories that `megatron_fuse.tokenization.load_tokenizer` reads. About
five minutes on two cores; exits with 1 where a figure misses what is wanted.
"""

import argparse
import sys
from pathlib import Path

from table import run_all

BOTH = {"--target-tokenizer": "target_tokenizer", "--source-tokenizer": "source_tokenizer"}
TEXTS = {"--instructions": "instructions"}
# file -> its inputs by flag, and its threads: figures per core are taken on one. The captured model has the
# smaller vocabulary.
BENCHMARKS = {
    "alignment_speed.py": (BOTH | TEXTS, 1),
    "mined_map.py": (BOTH, 1),
    "bytes_per_token.py": (BOTH | TEXTS | {"--large-target-tokenizer": "large_target_tokenizer"}, 1),
    "build_memory.py": (BOTH | TEXTS, 1),
    "capture_speed.py": (TEXTS | {"--source-tokenizer": "target_tokenizer"}, 2),
    "loader_speed.py": ({}, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("target_tokenizer", "large_target_tokenizer", "source_tokenizer", "instructions"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True)
    return run_all(parser, BENCHMARKS)


if __name__ == "__main__":
    sys.exit(main())
