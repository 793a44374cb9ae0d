"""Run everything of a recipe that is not yet done, in order: data stages, training under torchrun, export.

    python tools/run_recipe.py --recipe examples/quickstart/recipe.yaml --nproc-per-node 2
    python tools/run_recipe.py --recipe R.yaml --plan         # what is done, what will run, what it may cost
    python tools/run_recipe.py --recipe R.yaml --until "fusion data"

Interrupted at any point, the same command continues. A source added to the recipe later runs that source's stages only.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import megatron_fuse.start  # noqa: F401
from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.estimates import Amounts, estimate_amounts
from megatron_fuse.fusion_data.summary import rule_lines
from megatron_fuse.idle_processes import idle_line
from megatron_fuse.pipeline import (
    check_files,
    data_stages,
    measured_flops_per_second,
    require_whole_training,
    training_flops,
)
from megatron_fuse.processes import run_tied
from megatron_fuse.progress import readable_seconds
from megatron_fuse.recipe import Recipe, add_recipe_arguments, dump_recipe, recipe_from_arguments
from megatron_fuse.responses import backend_of
from megatron_fuse.storage import temporary_then_rename
from megatron_fuse.target import checkpoint_directory, export_directory
from megatron_fuse.text_safety import say
from megatron_fuse.training.checkpoint_files import LATEST

ROOT = Path(__file__).resolve().parents[1]


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
    names = [stage.name for stage in data_stages(recipe)] + ["training", "export"]
    if arguments.until and arguments.until not in names:
        raise UserError(f"--until {arguments.until!r}: the stages of this recipe are {', '.join(names)}")
    if arguments.plan:
        print_plan(recipe, arguments.nproc_per_node)
        return
    if arguments.nproc_per_node > 1:
        warn_of_idle_processes(recipe, estimate_amounts(recipe), arguments.nproc_per_node)
    resolved = write_resolved_recipe(recipe)
    for name in names:
        run_stage(name, recipe, resolved, arguments.nproc_per_node)
        if name == arguments.until:
            break


def run_stage(name: str, recipe: Recipe, resolved: Path, processes: int) -> None:
    if name == "training":
        run(["pretrain_fuse.py", "--recipe", str(resolved)], processes)
        require_whole_training(recipe)
    elif name == "export":
        run(["tools/export_model.py", "--recipe", str(resolved)], 1)
    else:
        # Counted again for every stage: its plan depends on what the stages before it wrote.
        (stage,) = [stage for stage in data_stages(recipe) if stage.name == name]
        if stage.is_done() and name != "fusion data":  # which also chooses between the sources and says what it chose
            say(f"{name}: done")
            return
        run([stage.tool, "--recipe", str(resolved)], processes)


def run(command: list[str], processes: int) -> None:
    """Runs one of our scripts, under torchrun where there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "megatron_fuse.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    script, *options = command
    say(
        f"$ {'torchrun --nproc-per-node ' + str(processes) if processes > 1 else 'python'} {' '.join(command)}",
    )
    start = time.perf_counter()
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1)), **os.environ}
    if code := run_tied([*launcher, str(ROOT / script), *options], env=environment):
        raise UserError(f"{script} ended with exit code {code}: fix what it says above and run this again")
    say(f"  {script}: {time.perf_counter() - start:.1f} s")


def write_resolved_recipe(recipe: Recipe) -> Path:
    """The recipe with all overrides, which every stage then reads."""
    path = recipe.workdir / "recipe.yaml"
    with temporary_then_rename(path) as temporary:
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    return path


def warn_of_idle_processes(recipe: Recipe, amounts: Amounts, processes: int) -> None:
    """Before the instructions are prepared, as long as data.shard_size can be changed for nothing."""
    if line := idle_line(recipe, amounts.examples, processes):
        say(line)


def print_plan(recipe: Recipe, processes: int) -> None:
    amounts, rate = estimate_amounts(recipe), measured_flops_per_second()
    say(
        f"{recipe.workdir}: {amounts.examples:,} examples, about {amounts.prompt_tokens:,.0f} tokens of prompts and "
        f"{amounts.response_tokens:,.0f} of ground truth; rough estimates, one process"
    )
    if any(backend_of(recipe, name) == "hf" for name in recipe.answering):
        most = recipe.responses.max_new_tokens
        say(
            f"answers are taken to be as long as the ground truth, about {amounts.answer_tokens:,.0f} tokens a model; "
            f"with responses.max_new_tokens = {most} they have {most * amounts.examples:,} at most"
        )
    warn_of_idle_processes(recipe, amounts, processes)
    for line in rule_lines(recipe):
        say(line)
    say(f"{'artefact':<48} {'state':<16} {'disk':>10} {'time':>10}")
    refusals = []
    for stage in data_stages(recipe):
        for work in stage.works:
            cost = ("", "")
            try:
                state = work.state()
                if state != "done":  # damaged weights are refused here
                    cost = readable_bytes(work.disk(amounts)), readable_seconds(work.flops(amounts) / rate)
            except UserError as refusal:
                state = "refused"
                refusals.append(str(refusal))
            say(f"{work.name:<48} {state:<16} {cost[0]:>10} {cost[1]:>10}")
    tracker = checkpoint_directory(recipe) / LATEST
    state, time_left = "to do", ""
    try:
        if tracker.exists():
            state = f"at step {tracker.read_text().strip()}"
        else:
            time_left = readable_seconds(training_flops(recipe, amounts) / rate)
    except UserError as refusal:
        state = "refused"
        refusals.append(str(refusal))
    say(f"{'training':<48} {state:<16} {'':>10} {time_left:>10}")
    exported = export_directory(recipe).exists()
    say(f"{'export':<48} {'done' if exported else 'to do':<16}")
    if refusals:
        raise UserError("\n       ".join(dict.fromkeys(refusals)))


def readable_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
