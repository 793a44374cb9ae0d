"""Runs the unfinished steps of a recipe.

Each step is a command, under torchrun if there are several processes.
"""

import logging
import os
import sys
import time
from pathlib import Path

from megatron_fuse.claiming import claiming
from megatron_fuse.errors import UserError
from megatron_fuse.logs import DEFAULT_LEVEL, log_level
from megatron_fuse.pipeline.estimates import estimate_amounts
from megatron_fuse.pipeline.idle_processes import idle_line
from megatron_fuse.pipeline.stages import Work, steps
from megatron_fuse.processes import run_tied
from megatron_fuse.recipe import Recipe, dump_recipe
from megatron_fuse.stages import Context, Stage
from megatron_fuse.storage import sha256_of_json, temporary_then_rename
from megatron_fuse.training.stage import TRAINING, require_whole_training

logger = logging.getLogger(__name__)


def run_recipe(recipe: Recipe, processes: int, until: str | None = None) -> None:
    """Runs all steps, or those up to `until`.

    Raises UserError if a command ends with an error, or if the training ends before its last step.
    """
    # Printed before the instructions are prepared: until then a change of data.shard_size costs nothing.
    if processes > 1 and (line := idle_line(recipe, estimate_amounts(Context(recipe)).examples, processes)):
        logger.warning(line)
    resolved = write_resolved_recipe(recipe)
    for name, works in steps(recipe, until).items():
        run_step(name, works, recipe, resolved, processes)


def run_step(name: str, works: list[Work], recipe: Recipe, resolved: Path, processes: int) -> None:
    """Runs the command of a step, unless all its artifacts are done. Raises UserError as run_recipe does."""
    if is_done(works, recipe):
        logger.info(f"{name}: done")
        return
    stage = works[0].stage
    _run_command(stage, resolved, 1 if stage.one_process else processes)
    if stage == TRAINING:
        require_whole_training(recipe)


def is_done(works: list[Work], recipe: Recipe) -> bool:
    """Whether a step has nothing to do. Raises UserError as Context.state does."""
    context = Context(recipe)  # a new context for every step, because the step before has written artifacts
    return not any(work.stage.always for work in works) and all(
        work.state(context) == "done" for work in works
    )


def _run_command(stage: Stage, recipe: Path, processes: int) -> None:
    """Runs a stage's command, under torchrun if there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "megatron_fuse.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    level = [] if log_level() == DEFAULT_LEVEL else ["--log-level", log_level()]
    words = [*stage.module, "--recipe", str(recipe), *level]
    logger.info(
        f"$ {'torchrun --nproc-per-node ' + str(processes) if processes > 1 else 'python'} {' '.join(words)}"
    )
    start = time.perf_counter()
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1)), **os.environ}
    if code := run_tied([*launcher, *words], env=environment):
        raise UserError(
            f"{stage.name} ended with exit code {code}. Fix the error above and run this command again."
        )
    logger.info(f"{stage.name}: {time.perf_counter() - start:.1f} s")


def write_resolved_recipe(recipe: Recipe) -> Path:
    """Writes the recipe with all overrides to WORKDIR/recipe.yaml, which every stage then reads.

    If processes take shards by claim, several runs may have overrides of their own, such as a batch size for
    their machine. Then each has a file of its own, WORKDIR/recipe-HASH.yaml. Returns the path.
    """
    content = dump_recipe(recipe)
    own = f"-{sha256_of_json(content)[:8]}" if claiming() else ""
    path = recipe.workdir / f"recipe{own}.yaml"
    with temporary_then_rename(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path
