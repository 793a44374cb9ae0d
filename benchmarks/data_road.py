"""The data road's benchmarks in one command, each in a process of its own.

    python benchmarks/data_road.py --target-tokenizer LLAMA2 --source-tokenizer GPT_NEOX \
        --large-target-tokenizer CL100K --instructions GPT4.jsonl --csv docs/benchmarks/data_road.csv

LLAMA2 and the others are files or directories that `megatron_fuse.tokenization.load_tokenizer` reads. About five minutes on two
cores; exits with 1 where a figure misses what is wanted.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

BOTH = {"--target-tokenizer": "target_tokenizer", "--source-tokenizer": "source_tokenizer"}
TEXTS = {"--instructions": "instructions"}
# file -> its inputs by flag, and its threads: figures per core are taken on one. The captured model has the smaller vocabulary.
BENCHMARKS = {
    "alignment_speed.py": (BOTH | TEXTS, 1),
    "mined_map.py": (BOTH, 1),
    "bytes_per_token.py": (BOTH | TEXTS | {"--large-target-tokenizer": "large_target_tokenizer"}, 1),
    "build_memory.py": (BOTH | TEXTS, 1),
    "capture_speed.py": (TEXTS | {"--source-tokenizer": "target_tokenizer"}, 2),
    "loader_speed.py": ({}, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target_tokenizer", "large_target_tokenizer", "source_tokenizer", "instructions"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True)
    parser.add_argument("--csv", type=Path, help="file that the rows are added to")
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS))
    options = parser.parse_args()
    failed = []
    for file in options.only:
        inputs, threads = BENCHMARKS[file]
        command = [sys.executable, str(Path(__file__).with_name(file))]
        for flag, name in (inputs | ({"--csv": "csv"} if options.csv else {})).items():
            command += [flag, str(getattr(options, name))]
        print(f"\n{file}, {threads} thread{'s' * (threads > 1)}", flush=True)
        if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=False).returncode:
            failed.append(file)
    print(f"\nmissed or failed: {', '.join(failed)}" if failed else "\nall that is wanted holds")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
