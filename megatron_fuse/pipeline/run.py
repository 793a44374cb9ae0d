"""Runs the unfinished steps of a recipe.

Each step is a command, under torchrun if there are several processes.
"""

import os
import sys
import time
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.pipeline.estimates import estimate_amounts
from megatron_fuse.pipeline.idle_processes import idle_line
from megatron_fuse.pipeline.stages import Work, steps
from megatron_fuse.processes import run_tied
from megatron_fuse.recipe import Recipe, dump_recipe
from megatron_fuse.stages import Context, Stage
from megatron_fuse.storage import temporary_then_rename
from megatron_fuse.text_safety import say
from megatron_fuse.training.stage import TRAINING, require_whole_training


def run_recipe(recipe: Recipe, processes: int, until: str | None = None) -> None:
    """Runs all steps, or those up to `until`.

    Raises UserError if a command ends with an error, or if the training ends before its last step.
    """
    # Printed before the instructions are prepared: until then a change of data.shard_size costs nothing.
    if processes > 1 and (line := idle_line(recipe, estimate_amounts(Context(recipe)).examples, processes)):
        say(line)
    resolved = write_resolved_recipe(recipe)
    for name, works in steps(recipe).items():
        run_step(name, works, recipe, resolved, processes)
        if name == until:
            break


def run_step(name: str, works: list[Work], recipe: Recipe, resolved: Path, processes: int) -> None:
    """Runs the command of a step, unless all its artifacts are done. Raises UserError as run_recipe does."""
    context = Context(recipe)  # a new context for every step, because the step before has written artifacts
    if not any(work.stage.always for work in works) and all(work.state(context) == "done" for work in works):
        say(f"{name}: done")
        return
    stage = works[0].stage
    _run_command(stage, resolved, 1 if stage.one_process else processes)
    if stage == TRAINING:
        require_whole_training(recipe)


def _run_command(stage: Stage, recipe: Path, processes: int) -> None:
    """Runs a stage's command, under torchrun if there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "megatron_fuse.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    words = [*stage.module, "--recipe", str(recipe)]
    say(f"$ {'torchrun --nproc-per-node ' + str(processes) if processes > 1 else 'python'} {' '.join(words)}")
    start = time.perf_counter()
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1)), **os.environ}
    if code := run_tied([*launcher, *words], env=environment):
        raise UserError(f"{stage.name} ended with exit code {code}. Fix the error above and run this command again.")
    say(f"  {stage.name}: {time.perf_counter() - start:.1f} s")


def write_resolved_recipe(recipe: Recipe) -> Path:
    """Writes the recipe with all overrides to WORKDIR/recipe.yaml, which every stage then reads.

    Returns its path.
    """
    path = recipe.workdir / "recipe.yaml"
    with temporary_then_rename(path) as temporary:
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    return path
