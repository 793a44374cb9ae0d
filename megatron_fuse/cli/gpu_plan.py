"""The plan of a recipe for GPUs that need not be here: its arguments, and what they print."""

import argparse

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe, path_argument
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_gpu_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a plan for GPUs that need not be here."""
    plan = parser.add_argument_group("plan for other GPUs: needs no weights, only each model's config.json")
    plan.add_argument(
        "--gpus",
        metavar="8xH100-80",
        help="number of GPUs of a node and their name; plans layouts, memory, time and disk for them",
    )
    plan.add_argument("--nodes", type=int, help="number of nodes with these GPUs (default: 1)")
    plan.add_argument(
        "--rates",
        type=path_argument,
        metavar="FILE",
        help="checks.jsonl of `megatron-fuse check-gpu`: measured rates in the place of assumed ones",
    )
    for name, words in (("prompt", "the prompt"), ("response", "the ground truth")):
        plan.add_argument(
            f"--{name}-tokens",
            type=float,
            metavar="N",
            help=f"mean tokens of {words} of an example, if the file of the instructions is not here",
        )


def wants_gpu_plan(arguments: argparse.Namespace) -> bool:
    """Whether GPUs are named. Raises UserError for an option that has no meaning without them."""
    for option in ("nodes", "rates", "prompt_tokens", "response_tokens"):
        if arguments.gpus is None and getattr(arguments, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} needs --gpus, the GPUs of the plan.")
    return arguments.gpus is not None


def print_gpu_plan(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Prints the plan of a recipe for the GPUs of the arguments.

    Raises UserError for an unknown GPU, or for numbers of tokens that are not possible.
    """
    tokens = (arguments.prompt_tokens, arguments.response_tokens)
    if (tokens[0] is None) != (tokens[1] is None):
        raise UserError("--prompt-tokens and --response-tokens belong together. Give both.")
    if any(count is not None and not 1 <= count <= 1e7 for count in tokens):
        raise UserError("--prompt-tokens and --response-tokens must be from 1 to 10 million")
    with importing():
        from megatron_fuse.pipeline.estimates import estimate_amounts, stated_amounts
        from megatron_fuse.planning import assumed_rates, make_plan, parse_cluster, plan_lines, read_rates
        from megatron_fuse.stages import Context
    cluster = parse_cluster(arguments.gpus, 1 if arguments.nodes is None else arguments.nodes)
    rates = assumed_rates(cluster.gpu)
    if arguments.rates:
        rates = read_rates(arguments.rates, rates)
    stated = tokens[0] is not None
    amounts = stated_amounts(recipe, *tokens) if stated else estimate_amounts(Context(recipe))
    say("\n".join(plan_lines(recipe, make_plan(recipe, amounts, cluster, rates), rates)))
