"""The whole job on small models that the project makes itself: what `make quickstart` runs.

    python examples/quickstart/run.py

Makes an instruction set that teaches three of six skills, three tokenizers, three source models and three
reward models. Runs the recipe with tensor parallelism over two processes (on a machine with a single GPU in
one process). Trains the target on the same data without any teacher (CSFT) and with the preset `fuse`, for
comparison. Measures all models on the three taught skills and on the three others. Everything that exists
already is kept: a second run goes straight to what is missing.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import megatron_fuse.start  # noqa: F401
from megatron_fuse.errors import exit_code
from megatron_fuse.processes import run_tied

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = "examples/quickstart/build"
FUSE = ["-m", "megatron_fuse.cli"]
RECIPE = ["--recipe", "examples/quickstart/recipe.yaml"]
# The instructions cover a part of what is measured, as real instruction sets do: three of six skills.
TAUGHT = ["addition", "sorting", "shifting"]
# Presets for comparison: no teacher at all, and the teachers' distributions without the sources' own answers
OTHERS = {"CSFT": "csft", "Fuse": "fuse"}


def process_count() -> int:
    """Two, each with a GPU of its own if there are any: two processes cannot share one."""
    count = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
    ).stdout
    return min(2, int(count.strip() or 0)) or 2


def run(title: str, *command: str, processes: int = 1) -> None:
    """Runs a script or a module from the project's root; a failure ends the quickstart with its own exit
    code.
    """
    print(
        f"\n=== {title}\n$ {f'torchrun --nproc-per-node {processes}' if processes > 1 else 'python'} "
        f"{' '.join(command)}",
        flush=True,
    )
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "megatron_fuse.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    # One thread per process: two cores run two processes, and more threads would only get in each other's
    # way.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if code := run_tied([*launcher, *command], cwd=ROOT, env=environment):
        raise SystemExit(code)


def main() -> None:
    began = time.perf_counter()
    processes = process_count()
    recipe = [*RECIPE, "--tensor-model-parallel-size", str(processes)]
    rows = ["--skills", *TAUGHT, "--per-skill", "200"]
    run("instructions", "examples/skills/skills.py", *rows, "--output", BUILD)
    run("tokenizers, source models, reward models", "examples/skills/make_models.py", "--output", BUILD)
    run("ProFuser", *FUSE, "run", *recipe, "--nproc-per-node", str(processes))
    for name, preset in OTHERS.items():
        output = f"{BUILD}/{preset}"
        other = ["--schedule-preset", preset, "--save", f"{output}/checkpoints"]
        other += ["--tensorboard-dir", f"{output}/tensorboard"]
        run(f"{name}: the same data", "-m", "megatron_fuse.pretrain", *recipe, *other, processes=processes)
        run(f"export of {name}", *FUSE, "export", *RECIPE, *other, "--export-path", f"{output}/export")
    models = [f"{name}={BUILD}/sources/{name}" for name in ("alpha", "beta", "gamma")]
    models += [f"{name}={BUILD}/{preset}/export" for name, preset in OTHERS.items()]
    models += [f"ProFuser={BUILD}/run/export"]
    run("evaluation", "examples/skills/evaluate.py", *models, "--taught", *TAUGHT, "--output", BUILD)
    print(f"\nthe whole quickstart: {(time.perf_counter() - began) / 60:.1f} min")
    print(f"the table: {BUILD}/evaluation.md")
    print(f"talk to the fused model: .venv/bin/megatron-fuse chat {BUILD}/run/export")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
