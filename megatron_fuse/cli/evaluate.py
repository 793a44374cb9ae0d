"""Measure models with lm-evaluation-harness, side by side, with standard errors and paired differences.

    megatron-fuse evaluate fused=WORKDIR/export vicuna=models/vicuna-7b-v1.5 --tasks openllm \\
        --output runs/evaluation --baseline vicuna
    megatron-fuse evaluate alpha=MODEL beta=MODEL --tasks arc_challenge gsm8k_cot --output OUT \\
        --data DIRECTORY --limit 40

Every model is a Hugging Face model directory. Without --data the questions come from the Hugging Face hub,
with --data from JSONL files. After an interruption, the same command continues where it stopped.
docs/evaluation.md describes every task.

Prints the table. Writes OUT/evaluation.{json,md,png}, and OUT/NAME/TASK.json with the outcome of every
question.
"""

import argparse

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.benchmarks import BENCHMARKS, GROUPS
from megatron_fuse.recipe import path_argument
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help=f"tasks or groups of tasks to run: {', '.join([*GROUPS, *BENCHMARKS])}",
    )
    parser.add_argument("--output", type=path_argument, required=True, help="directory of the results")
    parser.add_argument(
        "--data",
        type=path_argument,
        help="directory of JSONL files that the questions are read from, without the network",
    )
    parser.add_argument("--baseline", help="model that the others are compared with; default: the first")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT questions of every task")
    parser.add_argument("--batch-size", default="8", help="sequences per forward pass, or auto")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the model's own chat template"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="most tokens of a generated answer; default: 256, as in lm-evaluation-harness",
    )


def run(arguments: argparse.Namespace) -> None:
    for name in ("limit", "max_new_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")
    if arguments.batch_size != "auto" and not (
        arguments.batch_size.isdecimal() and int(arguments.batch_size) > 0
    ):
        raise UserError(f"--batch-size must be auto or a number of at least 1, not {arguments.batch_size!r}")
    with importing():
        from megatron_fuse.evaluation import Settings, benchmarks_named, evaluate, models_named
        from megatron_fuse.evaluation.page import comparison_text
    comparison, failures = evaluate(
        models_named(arguments.models),
        benchmarks_named(arguments.tasks),
        arguments.output,
        data=arguments.data,
        settings=Settings(arguments.limit, arguments.apply_chat_template, arguments.max_new_tokens),
        batch_size=arguments.batch_size if arguments.batch_size == "auto" else int(arguments.batch_size),
        baseline=arguments.baseline,
    )
    say(f"\n{comparison_text(comparison)}\n\nwritten to {arguments.output}")
    if failures:
        failed = ", ".join(f"{model} on {task}" for model, task in failures)
        raise UserError(
            f"{failed} failed. Run the same command again: it repeats these and keeps the finished results."
        )
