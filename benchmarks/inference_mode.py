"""The benchmarks of answers, scores and selection in one command, each in a process of its own.

    python benchmarks/inference_mode.py --tokenizer LLAMA2 --instructions GPT4.jsonl --answers \
        ALPACA_EVAL.jsonl \
        --csv docs/benchmarks/inference_mode.csv

LLAMA2 is a tokenizer's file; ALPACA_EVAL.jsonl has rows as `selection_agreement.py` says. About forty minutes
on two cores; exits with 1 where a figure misses what is wanted.
"""

import argparse
from pathlib import Path

from table import run_all

# file -> its inputs by flag, and its threads
BENCHMARKS = {
    "generation_speed.py": ({"--source-tokenizer": "tokenizer", "--instructions": "instructions"}, 2),
    "scoring_speed.py": ({"--reward-model-tokenizer": "tokenizer", "--answers": "answers"}, 2),
    "selection_agreement.py": (
        {"--reward-model-tokenizer": "tokenizer", "--answers": "answers", "--reference": "reference"},
        2,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("tokenizer", "instructions", "answers"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--reference", default="gpt4", help="model whose answers are taken as ground truth")
    return run_all(parser, BENCHMARKS)


if __name__ == "__main__":
    raise SystemExit(main())
