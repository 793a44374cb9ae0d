"""Shows what of a recipe is done, what will run, and the likely cost in time and disk. Runs nothing.

    megatron-fuse plan --recipe examples/quickstart/recipe.yaml --nproc-per-node 2
    megatron-fuse plan --recipe R.yaml --gpus 8xH100-80 --nodes 4 --rates checks.jsonl

With --gpus the plan is for GPUs that need not be here: layout, memory, time and disk of every stage, from the
models' config.json alone. docs/scaling.md has examples. The same as `megatron-fuse run --plan`.
"""

import argparse

from megatron_fuse.cli import run as run_command
from megatron_fuse.cli.gpu_plan import add_gpu_plan_arguments
from megatron_fuse.recipe import add_recipe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    run_command.add_processes_argument(parser)
    add_gpu_plan_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    run_command.run(argparse.Namespace(**vars(arguments), plan=True, until=None, claim=None))
