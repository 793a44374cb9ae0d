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
from megatron_fuse.cli.gpu_plan import add_gpu_plan_arguments, print_gpu_plan, wants_gpu_plan
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.start import importing


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
    add_gpu_plan_arguments(parser)


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=int, default=1, help="number of processes of every stage")


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    if wants_gpu_plan(arguments):
        if not arguments.plan:
            raise UserError("--gpus needs --plan: a run uses the GPUs that are here.")
        print_gpu_plan(recipe, arguments)
        return
    with importing():
        from megatron_fuse.pipeline.start import plan_recipe, start_recipe
    processes, until = arguments.nproc_per_node, arguments.until
    if arguments.plan:
        plan_recipe(recipe, processes, until)
    else:
        start_recipe(recipe, processes, until, by_claim=take_claims(arguments))
