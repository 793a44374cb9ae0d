"""Checks what a command asks of a recipe, and then plans it or runs it."""

from megatron_fuse.capture.megatron_layout import check_processes
from megatron_fuse.errors import UserError
from megatron_fuse.pipeline.plan_table import print_plan
from megatron_fuse.pipeline.preflight import check_files
from megatron_fuse.pipeline.run import run_recipe
from megatron_fuse.pipeline.stages import steps
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context
from megatron_fuse.training.stage import TRAINING

_MOST_PROCESSES = 4096


def plan_recipe(recipe: Recipe, processes: int, until: str | None = None) -> None:
    """Prints the stages with their state and cost.

    Raises UserError for missing files, for an unknown stage `until`, and for artifacts that do not fit.
    """
    check_files(recipe)
    _require_stage(until, list(steps(recipe)))
    print_plan(Context(recipe), processes)


def start_recipe(recipe: Recipe, processes: int, until: str | None = None, *, by_claim: bool = False) -> None:
    """Runs the unfinished stages up to `until`; by claim at the latest those before the training.

    Raises UserError for missing files, for numbers of processes that do not fit, for an unknown stage, and as
    run_recipe does.
    """
    check_files(recipe)
    model_parallel = recipe.parallel.model_parallel_size
    if not 1 <= processes <= _MOST_PROCESSES or processes % model_parallel:
        raise UserError(
            f"--nproc-per-node {processes}: the number of processes must be a multiple of "
            f"{model_parallel} (tensor x pipeline parallelism of the recipe) and at most {_MOST_PROCESSES}"
        )
    layout = recipe.parallel
    of_experts = layout.experts_size * layout.pipeline_model_parallel_size
    if processes % of_experts:
        raise UserError(
            f"--nproc-per-node {processes}: the number of processes must be a multiple of {of_experts} "
            "(expert_model_parallel_size x expert_tensor_parallel_size x pipeline_model_parallel_size of the "
            "recipe's section parallel)"
        )
    for source in recipe.sources:
        check_processes(recipe, source, processes)
    names = list(steps(recipe))
    _require_stage(until, names)
    shared = names[: names.index(TRAINING.name)]
    if by_claim and until not in (None, *shared):
        raise UserError(
            f"--until {until!r}: the training has one owner. With --claim, choose one of {', '.join(shared)}."
        )
    run_recipe(recipe, processes, until or (shared[-1] if by_claim else None))


def _require_stage(until: str | None, names: list[str]) -> None:
    if until and until not in names:
        raise UserError(f"--until {until!r} is not a stage of this recipe. Choose one of {', '.join(names)}.")
