"""Peak memory of build_fusion_data on some examples and on ten times as many.

    python benchmarks/build_memory.py --target-tokenizer T --source-tokenizer S --instructions FILE.jsonl \
        --csv runs/build_memory.csv

Texts and tokenizers are real, the captured rows synthetic (synthetic_captures.py). Each build runs in a
process of its own; what counts is the largest resident set that the system saw of it (getrusage), imports and
tokenizers included. The second figure leaves out what the process held before the build: it shows a growth
that the imports would hide.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

from synthetic_captures import synthetic_run
from table import Measurement, run

from megatron_fuse.dataset import build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import read_rows
from megatron_fuse.processes import end_with_pool
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context

WANTED = "ratio <= 1.2"
TIMES = 10
SHARD_SIZE = 64
_MEBIBYTE = 2**20
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target-tokenizer", type=Path, required=True)
    parser.add_argument("--source-tokenizer", type=Path, required=True)
    parser.add_argument(
        "--instructions",
        type=Path,
        required=True,
        help="instruction file (JSONL in any form that a recipe takes)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=300,
        help=f"examples of the smaller build; the larger one has {TIMES} times as many",
    )


def measure(options: argparse.Namespace) -> list[Measurement]:
    rows = len(read_rows(options.instructions))
    if rows < TIMES * options.examples:
        raise UserError(
            f"{options.instructions} has {rows} rows, but {TIMES} x --examples {options.examples} are needed"
        )
    small, large = (_memory_of_a_build(options, times * options.examples) for times in (1, TIMES))
    found = []
    for name, wanted, few, many in zip(("", ", above the start"), (WANTED, ""), small, large, strict=True):
        title = f"build_fusion_data, {TIMES * options.examples} examples: peak memory{name}"
        found.append(Measurement(title, many, "MiB", f"{options.examples} examples", few, wanted))
    return found


def _memory_of_a_build(options: argparse.Namespace, examples: int) -> tuple[float, float]:
    """MiB: at the peak; at the peak, above the peak before the build."""
    with tempfile.TemporaryDirectory() as directory:
        recipe = synthetic_run(
            Path(directory),
            options.target_tokenizer,
            {"source": options.source_tokenizer},
            options.instructions,
            examples=examples,
            shard_size=SHARD_SIZE,
        )
        with multiprocessing.get_context("spawn").Pool(1, end_with_pool) as pool:
            before, peak = pool.apply(_build, (recipe,))
    return peak, peak - before


def _build(recipe: Recipe) -> tuple[float, float]:
    """In a process of its own. MiB at most so far, before and after the build."""
    for options in (recipe.target, *recipe.sources.values()):
        load_format(options, "benchmark")
    before = _peak()
    build_fusion_data(Context(recipe))
    return before, _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / _MEBIBYTE


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
