"""Run all unfinished steps of a recipe in order: data stages, training under torchrun, export.

    megatron-fuse run --recipe examples/quickstart/recipe.yaml --nproc-per-node 2
    megatron-fuse run --recipe R.yaml --plan         # what is done, what will run, what it may cost
    megatron-fuse run --recipe R.yaml --until "fusion data"

After an interruption at any point, the same command continues. If a source is added to the recipe later, only
the stages of that source run.
"""

import argparse

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.start import importing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_processes_argument(parser)
    parser.add_argument(
        "--plan", action="store_true", help="print the stages with their state and cost, and run nothing"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=int, default=1, help="number of processes of every stage")


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    with importing():
        from megatron_fuse.pipeline import check_files, steps
        from megatron_fuse.pipeline.plan_table import print_plan
        from megatron_fuse.pipeline.run import run_recipe
        from megatron_fuse.stages import Context
    check_files(recipe)
    model_parallel = recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size
    if not arguments.plan and (
        not 1 <= arguments.nproc_per_node <= 4096 or arguments.nproc_per_node % model_parallel
    ):
        raise UserError(
            f"--nproc-per-node {arguments.nproc_per_node}: the number of processes must be a multiple of "
            f"{model_parallel} (tensor x pipeline parallelism of the recipe) and at most 4096"
        )
    names = list(steps(recipe))
    if arguments.until and arguments.until not in names:
        raise UserError(
            f"--until {arguments.until!r} is not a stage of this recipe. Choose one of {', '.join(names)}."
        )
    if arguments.plan:
        print_plan(Context(recipe), arguments.nproc_per_node)
    else:
        run_recipe(recipe, arguments.nproc_per_node, arguments.until)
