"""Fuse several source models into one target: the training job.

    torchrun --nproc-per-node 2 -m megatron_fuse.pretrain --recipe examples/quickstart/recipe.yaml \
        --tensor-model-parallel-size 2
    torchrun --nproc-per-node 2 -m megatron_fuse.pretrain --recipe R.yaml --dry-run    # sizes and step plan
    python -m megatron_fuse.pretrain --recipe R.yaml --print-recipe                    # what would run

The fusion data must exist (`megatron-fuse run` makes everything in order). If there is a checkpoint, training
continues from it.
"""

import megatron_fuse.start  # noqa: F401  # first: from here on Ctrl-C ends with one line

# isort: split

import argparse
import logging

from megatron_fuse.errors import exit_code
from megatron_fuse.logs import add_log_level, start_logging
from megatron_fuse.recipe import Recipe, add_recipe_arguments, recipe_from_arguments
from megatron_fuse.start import importing

# Not __name__: under `python -m` that is __main__, whose messages start_logging does not show.
logger = logging.getLogger("megatron_fuse.pretrain")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    add_log_level(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, print sizes, memory and steps, and do not train",
    )
    arguments = parser.parse_args()
    recipe = recipe_from_arguments(arguments)
    start_logging(arguments.log_level)
    # After --help and --print-recipe, which need none of it (megatron_fuse/cli/__init__.py).
    with importing():
        from torch.distributed.elastic.multiprocessing.errors import record
    # torchrun then shows the traceback of the rank that failed first, and not those of the ranks that waited
    # for it.
    record(pretrain)(recipe, dry_run=arguments.dry_run)


def pretrain(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Trains as the recipe says, from the last checkpoint if there is one.

    dry_run: build everything, print sizes, memory and the step plan, and stop. Raises UserError for what
    cannot be trained.
    """
    with importing():
        from megatron_fuse.runtime import start_runtime, stop_runtime
        from megatron_fuse.runtime.distributed import banner
        from megatron_fuse.target import read_target
    # An error in the recipe ends every rank here, before one waits for another.
    target = read_target(recipe)
    runtime = start_runtime(
        **recipe.parallel.sizes, seed=recipe.training_seed, deterministic=recipe.training.deterministic
    )
    # Megatron-core may only be imported once the runtime has prepared the process for a machine without CUDA.
    from megatron_fuse.dataset import FusionDataset
    from megatron_fuse.report.loss_curve import write_loss_curve
    from megatron_fuse.training.advice import loss_advice, stored_mass_advice
    from megatron_fuse.training.banner import describe_run
    from megatron_fuse.training.directories import metrics_directory
    from megatron_fuse.training.dry_run import print_dry_run
    from megatron_fuse.training.memory import advise_when_out_of_memory
    from megatron_fuse.training.target import build_target
    from megatron_fuse.training.trainer import make_trainer, train

    dataset = FusionDataset(recipe)
    # Every rank reads the same rows, so that damage in them ends all ranks alike.
    advice = [*loss_advice(recipe), *stored_mass_advice(recipe, dataset)]
    for line in advice if runtime.is_logging_rank else []:
        logger.warning(line)
    with advise_when_out_of_memory(recipe, target.architecture, runtime, dataset):
        chunks = build_target(recipe, target)
        what = describe_run(recipe, target.architecture, chunks, entries_per_row=dataset.entries_per_row)
        logger.info(banner(runtime, what))
        trainer = make_trainer(recipe, runtime, target.architecture, chunks, dataset)
        if dry_run:
            print_dry_run(trainer)
        else:
            train(trainer)
    stop_runtime()
    if runtime.is_logging_rank and not dry_run:
        write_loss_curve(metrics_directory(recipe))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
