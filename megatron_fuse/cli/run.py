"""Run all unfinished steps of a recipe in order: data stages, training under torchrun, export.

    megatron-fuse run --recipe examples/quickstart/recipe.yaml --nproc-per-node 2
    megatron-fuse run --recipe R.yaml --plan         # what is done, what will run, what it may cost
    megatron-fuse run --recipe R.yaml --plan --gpus 8xH100-80 --nodes 4
    megatron-fuse run --recipe R.yaml --until "fusion data"
    megatron-fuse run --recipe R.yaml --claim        # any number of these; all stages before the training

After an interruption at any point, the same command continues. If a source is added to the recipe later, only
the stages of that source run.
"""

import argparse

from megatron_fuse.cli.claim_arguments import add_claim_arguments, take_claims
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe, add_recipe_arguments, path_argument, recipe_from_arguments
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_processes_argument(parser)
    parser.add_argument(
        "--plan", action="store_true", help="print the stages with their state and cost, and run nothing"
    )
    parser.add_argument(
        "--until",
        metavar="STAGE",
        help="stop after this stage; with --claim, at the latest before the training",
    )
    add_claim_arguments(parser, may_leave=False)
    add_plan_arguments(parser)


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=int, default=1, help="number of processes of every stage")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a plan for GPUs that need not be here."""
    plan = parser.add_argument_group("plan for other GPUs: needs no weights, only each model's config.json")
    plan.add_argument(
        "--gpus",
        metavar="8xH100-80",
        help="number of GPUs of a node and their name; plans layouts, memory, time and disk for them",
    )
    plan.add_argument("--nodes", type=int, default=1, help="number of nodes with these GPUs (default: 1)")
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


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    if arguments.gpus is not None:
        if not arguments.plan:
            raise UserError("--gpus needs --plan: a run uses the GPUs that are here.")
        _print_plan_for_gpus(recipe, arguments)
        return
    for option in ("rates", "prompt_tokens", "response_tokens"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} needs --gpus, the GPUs of the plan.")
    with importing():
        from megatron_fuse.capture.megatron_layout import check_processes
        from megatron_fuse.pipeline import check_files, steps
        from megatron_fuse.pipeline.plan_table import print_plan
        from megatron_fuse.pipeline.run import run_recipe
        from megatron_fuse.stages import Context
        from megatron_fuse.training.stage import TRAINING
    check_files(recipe)
    model_parallel = recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size
    if not arguments.plan and (
        not 1 <= arguments.nproc_per_node <= 4096 or arguments.nproc_per_node % model_parallel
    ):
        raise UserError(
            f"--nproc-per-node {arguments.nproc_per_node}: the number of processes must be a multiple of "
            f"{model_parallel} (tensor x pipeline parallelism of the recipe) and at most 4096"
        )
    for source in [] if arguments.plan else recipe.sources:
        check_processes(recipe, source, arguments.nproc_per_node)
    names = list(steps(recipe))
    if arguments.until and arguments.until not in names:
        raise UserError(
            f"--until {arguments.until!r} is not a stage of this recipe. Choose one of {', '.join(names)}."
        )
    if arguments.plan:
        print_plan(Context(recipe), arguments.nproc_per_node)
    elif take_claims(arguments):
        shared = names[: names.index(TRAINING.name)]
        if arguments.until not in (None, *shared):
            raise UserError(
                f"--until {arguments.until!r}: the training has one owner. With --claim, choose one of "
                f"{', '.join(shared)}."
            )
        run_recipe(recipe, arguments.nproc_per_node, arguments.until or shared[-1])
    else:
        run_recipe(recipe, arguments.nproc_per_node, arguments.until)


def _print_plan_for_gpus(recipe: Recipe, arguments: argparse.Namespace) -> None:
    tokens = (arguments.prompt_tokens, arguments.response_tokens)
    if (tokens[0] is None) != (tokens[1] is None):
        raise UserError("--prompt-tokens and --response-tokens belong together. Give both.")
    if any(count is not None and not 1 <= count <= 1e7 for count in tokens):
        raise UserError("--prompt-tokens and --response-tokens must be from 1 to 10 million")
    with importing():
        from megatron_fuse.pipeline.estimates import estimate_amounts, stated_amounts
        from megatron_fuse.planning import assumed_rates, make_plan, parse_cluster, plan_lines, read_rates
        from megatron_fuse.stages import Context
    cluster = parse_cluster(arguments.gpus, arguments.nodes)
    rates = assumed_rates(cluster.gpu)
    if arguments.rates:
        rates = read_rates(arguments.rates, rates)
    stated = tokens[0] is not None
    amounts = stated_amounts(recipe, *tokens) if stated else estimate_amounts(Context(recipe))
    say("\n".join(plan_lines(recipe, make_plan(recipe, amounts, cluster, rates), rates)))
