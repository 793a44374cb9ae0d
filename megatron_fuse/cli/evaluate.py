"""Measure models side by side: on benchmarks with lm-evaluation-harness, or by judged answers to prompts.

    megatron-fuse evaluate fused=WORKDIR/export vicuna=models/vicuna-7b-v1.5 --tasks openllm \\
        --output runs/evaluation --baseline vicuna
    megatron-fuse evaluate alpha=MODEL beta=MODEL --tasks arc_challenge gsm8k_cot --output OUT \\
        --data DIRECTORY --limit 40
    megatron-fuse evaluate vicuna=MODEL fused=WORKDIR/export --open-ended mt_bench.jsonl --output OUT \\
        --recipe R.yaml

Every model is a Hugging Face model directory. After an interruption, the same command continues where it
stopped. docs/evaluation.md describes every task and the forms of prompts.

--tasks: standard errors and paired differences. Without --data the questions come from the Hugging Face hub,
with --data from JSONL files. Prints the table. Writes OUT/evaluation.{json,md,png}, and OUT/NAME/TASK.json
with the outcome of every question.

--open-ended: the models answer the prompts of a file with the same sampling settings. Reward models
(--recipe, --reward-model), a model behind a server (--judge-url, --judge-model), or both compare the answers
in pairs. A model can also be named without a directory: NAME is then a source of the recipe, or a model whose
answers are in the file. Prints win rates. Writes OUT/open_ended.{json,md,html,png} and OUT/judgements.jsonl.
"""

import argparse

from megatron_fuse.cli.open_ended_arguments import (
    add_open_ended_arguments,
    open_ended_given,
    run_open_ended,
)
from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.benchmarks import BENCHMARKS, GROUPS
from megatron_fuse.recipe import path_argument
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        "--tasks",
        nargs="+",
        help=f"tasks or groups of tasks to run: {', '.join([*GROUPS, *BENCHMARKS])}",
    )
    kinds.add_argument(
        "--open-ended",
        type=path_argument,
        metavar="PROMPTS",
        help="file of prompts in the form of MT-bench or AlpacaEval, JSONL or JSON",
    )
    parser.add_argument("--output", type=path_argument, required=True, help="directory of the results")
    parser.add_argument("--baseline", help="model that the others are compared with; default: the first")
    parser.add_argument(
        "--limit", type=int, help="use only the first LIMIT questions of every task, or prompts"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="most tokens of a generated answer; default: 256, as in lm-evaluation-harness, and 1024 for "
        "--open-ended",
    )
    group = parser.add_argument_group("options of --tasks")
    group.add_argument(
        "--data",
        type=path_argument,
        help="directory of JSONL files that the questions are read from, without the network",
    )
    group.add_argument("--batch-size", help="sequences per forward pass, or auto; default: 8")
    group.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the model's own chat template"
    )
    add_open_ended_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    of_tasks = {
        "--data": arguments.data,
        "--batch-size": arguments.batch_size,
        "--apply-chat-template": arguments.apply_chat_template,
    }
    given = [flag for flag, value in of_tasks.items() if value] if arguments.open_ended else []
    given += [] if arguments.open_ended else open_ended_given(arguments)
    if given:
        kind, other = ("--open-ended", "--tasks") if arguments.open_ended else ("--tasks", "--open-ended")
        raise UserError(f"{', '.join(given)}: for {other} only, and has no effect on {kind}. Leave it out.")
    for name in ("limit", "max_new_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")
    if arguments.open_ended:
        run_open_ended(arguments)
    else:
        _run_tasks(arguments)


def _run_tasks(arguments: argparse.Namespace) -> None:
    batch_size = arguments.batch_size or "8"
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
        raise UserError(f"--batch-size must be auto or a number of at least 1, not {batch_size!r}")
    with importing():
        from megatron_fuse.evaluation import Settings, benchmarks_named, evaluate, models_named
        from megatron_fuse.evaluation.page import comparison_text
    comparison, failures = evaluate(
        models_named(arguments.models),
        benchmarks_named(arguments.tasks),
        arguments.output,
        data=arguments.data,
        settings=Settings(arguments.limit, arguments.apply_chat_template, arguments.max_new_tokens),
        batch_size=batch_size if batch_size == "auto" else int(batch_size),
        baseline=arguments.baseline,
    )
    say(f"\n{comparison_text(comparison)}\n\nwritten to {arguments.output}")
    if failures:
        failed = ", ".join(f"{model} on {task}" for model, task in failures)
        raise UserError(
            f"{failed} failed. Run the same command again: it repeats these and keeps the finished results."
        )
