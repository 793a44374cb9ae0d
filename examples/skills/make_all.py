"""Instructions and models of the experiments; what is there already stays.

python examples/skills/make_all.py --output examples/skills/build
"""

import argparse
from pathlib import Path

from make_models import make_models
from make_tokenizers import make_tokenizers
from skills import write_instructions
from train_relatives import make_relatives

from megatron_fuse.errors import exit_code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument("--per-skill", type=int, default=280, help="instructions of each skill")
    parser.add_argument(
        "--relatives", action="store_true", help="make also the models of one family (train_relatives.py)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of models, tokenizers and instructions; another seed makes another set of them",
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    seed = 1234 + options.seed
    instructions = options.output / "instructions.jsonl"
    print(f"{instructions}: {write_instructions(instructions, options.per_skill, seed)} examples")
    make_tokenizers(options.output, seed)
    make_models(options.output, options.processes, options.seed)
    if options.relatives:
        make_relatives(options.output, options.processes, options.seed)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
