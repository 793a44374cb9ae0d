"""Run everything of a recipe that is not yet done, in order: data stages, training under torchrun, export.

    python tools/run_recipe.py --recipe examples/quickstart/recipe.yaml --nproc-per-node 2
    python tools/run_recipe.py --recipe R.yaml --plan         # what is done, what will run, what it may cost
    python tools/run_recipe.py --recipe R.yaml --until "fusion data"

Interrupted at any point, the same command continues. A source added to the recipe later runs that source's stages only.
"""

import argparse

import megatron_fuse.start  # noqa: F401
from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.pipeline import check_files, steps
from megatron_fuse.pipeline.plan_table import print_plan
from megatron_fuse.pipeline.run import run_recipe
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.stages import Context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes of every stage")
    parser.add_argument(
        "--plan", action="store_true", help="print the stages with their state and cost, and run nothing"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    arguments = parser.parse_args()
    recipe = recipe_from_arguments(arguments)
    check_files(recipe)
    model_parallel = recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size
    if not arguments.plan and (not 1 <= arguments.nproc_per_node <= 4096 or arguments.nproc_per_node % model_parallel):
        raise UserError(
            f"--nproc-per-node {arguments.nproc_per_node}: tensor x pipeline parallelism of the recipe needs a multiple of "
            f"{model_parallel} processes, up to 4096"
        )
    names = list(steps(recipe))
    if arguments.until and arguments.until not in names:
        raise UserError(f"--until {arguments.until!r}: the stages of this recipe are {', '.join(names)}")
    if arguments.plan:
        print_plan(Context(recipe), arguments.nproc_per_node)
    else:
        run_recipe(recipe, arguments.nproc_per_node, arguments.until)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
