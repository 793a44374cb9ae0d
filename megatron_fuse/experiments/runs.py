"""One run: the commands that train and measure one variant with one seed, and the files that they write.

WORKDIR/runs/NAME/seed-N/recipe.yaml             the recipe of the run, with every option written out
                         log.txt                 the output of its commands
                         export/                 the model
                         begun.json              options and commit, written before anything else
                         result.json             options, commit, steps, tokens, seconds; once the model is
                                                 complete
                         evaluation-SPLIT.json   {metric: {value, n}}, command and commit of the measurement

Each command continues where it was interrupted, and so does a run. If the command `evaluate` has changed, the
model is measured again.
"""

import importlib.metadata
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.experiment import (
    Experiment,
    Merge,
    command_parts,
    run_name,
    scenario_and_name,
)
from megatron_fuse.experiments.fork_server import Commands
from megatron_fuse.experiments.layers import run_directory, variant_recipe, with_places
from megatron_fuse.experiments.records import Begun, Evaluation, Metrics, read_record
from megatron_fuse.fusion_data.layout import TEXT
from megatron_fuse.instructions import INSTRUCTIONS
from megatron_fuse.pipeline import check_files, steps
from megatron_fuse.pipeline.run import is_done, write_resolved_recipe
from megatron_fuse.recipe import Recipe, checked, dump_recipe, renamed
from megatron_fuse.stages import Context
from megatron_fuse.storage import read_json, sha256_of_json, temporary_then_rename, write_json
from megatron_fuse.training.metrics import METRICS, STEP, read_metrics
from megatron_fuse.training.stage import EXPORT, TRAINING, require_whole_training

_CHECKOUT = Path(__file__).resolve().parents[2]  # of git, unless the package is installed


class RunFailed(UserError):
    """A command of a run ended with an error.

    The message names the run, the command, its last output and its log.
    """


@dataclass(frozen=True)
class Run:
    """A variant, merge or model of an experiment with one seed."""

    experiment: Experiment = field(compare=False)
    name: str  # with its scenario, as in Experiment.run_names
    seed: int

    @property
    def scenario(self) -> str | None:
        return scenario_and_name(self.name)[0]

    @property
    def row(self) -> str:
        """The name of the variant, merge or model."""
        return scenario_and_name(self.name)[1]

    @property
    def merge(self) -> Merge | None:
        return self.experiment.merges.get(self.row)

    @property
    def parts(self) -> list["Run"]:
        """The runs that a merge is made from; empty for other runs."""
        names = self.merge.parts if self.merge else []
        return [Run(self.experiment, run_name(self.scenario, name), self.seed) for name in names]

    @property
    def directory(self) -> Path:
        return run_directory(self.experiment, self.name, self.seed)

    @property
    def model(self) -> Path:
        """The Hugging Face directory of the model that is measured."""
        given = self.experiment.models.get(self.row)
        return Path(with_places(str(given), self.seed, self.scenario)) if given else self.directory / "export"

    def evaluation(self, split: str) -> Path:
        return self.directory / f"evaluation-{split}.json"

    def is_made(self) -> bool:
        return (self.directory / "result.json").exists()

    def is_finished(self, split: str) -> bool:
        path = self.evaluation(split)
        return (
            self.is_made()
            and path.exists()
            and read_record(Evaluation, path).command == self.experiment.evaluate
        )

    def options(self) -> dict[str, Any]:
        """All options that decide the result of the run, as result.json stores them."""
        if self.row in self.experiment.variants:
            recipe = variant_recipe(self.experiment, self.name, self.seed)
            return {"recipe": recipe.model_dump(mode="json", by_alias=True)}
        if self.merge:
            return {
                "merge": self.merge.model_dump(mode="json"),
                "of": {part.row: part.options() for part in self.parts},
            }
        return {"model": str(self.model)}


# A run's numbers depend on all code, except tests and benchmarks, and except the code that starts runs and
# reports them.
_ELSEWHERE = ("tests", "benchmarks", "kernels/benchmarks", "kernels/checks")
_ABOUT_RUNS = (
    "megatron_fuse/experiments",
    "megatron_fuse/report",
    "megatron_fuse/reporting",
    "megatron_fuse/cli/experiments.py",
    "tools/run_experiments.py",
)
_CODE = [":(glob)**/*.py", *(f":(exclude){place}" for place in _ELSEWHERE + _ABOUT_RUNS)]


_FUSE = [sys.executable, "-m", "megatron_fuse.cli"]


def code_version() -> str:
    """The last commit that changed the code of runs.

    If there are uncommitted changes: with a + and a hash of them. For a package that is installed without its
    repository: its version.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(_CHECKOUT), *arguments, "--", *_CODE],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("diff", "HEAD")
    return (git("log", "-1", "--format=%h", "--abbrev=10") or importlib.metadata.version("megatron-fuse")) + (
        f"+{sha256_of_json(changed)[:6]}" if changed else ""
    )


def make(run: Run, commands: Commands, data_lock: Lock, split: str, version: str) -> None:
    """Trains or merges a model, then measures it. Finished parts are not repeated.

    data_lock: the lock of the data, because runs of one scenario and seed must take turns with the data
    stages. version: code_version() of the code that `commands` has imported.

    Raises RunFailed if a command fails. Raises UserError if the directory holds a run with other options or
    code, or if the code has changed since the begin.
    """
    _refuse_another(run, version)
    if not run.is_made():
        start = time.perf_counter()
        if run.row in run.experiment.variants:
            measured = _train(run, commands, data_lock)
        elif run.merge:
            measured = _merge(run, commands, run.merge)
        else:
            measured = {}
        _refuse_changed_code(run, version)
        made_from = {"options": run.options(), "commit": version}
        write_json(
            run.directory / "result.json", {**made_from, "seconds": time.perf_counter() - start, **measured}
        )
    if not run.is_finished(split):
        metrics = _evaluate(run, commands, split)
        _refuse_changed_code(run, version)
        write_json(
            run.evaluation(split), {"command": run.experiment.evaluate, "commit": version, "metrics": metrics}
        )


def _refuse_another(run: Run, version: str) -> None:
    path = run.directory / "begun.json"
    now = {"options": run.options(), "commit": version}
    if not path.exists():
        run.directory.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
        return
    begun = read_record(Begun, path)
    refuse_other_options(run, begun.options)
    if begun.commit != version:
        raise UserError(
            f"{run.directory} holds a run of commit {begun.commit}, but the current commit is {version}. "
            f"Check out {begun.commit}, or remove {run.directory} and run the experiment again."
        )


def refuse_other_options(run: Run, made_by: dict[str, Any]) -> None:
    """Raises UserError if the experiment's file now gives other options than those that made a run."""
    if sha256_of_json(_with_new_names(made_by)) != sha256_of_json(run.options()):
        raise UserError(
            f"{run.directory} holds a run with other options than {run.name} has now. Remove the directory "
            "and run the experiment again, or set another workdir."
        )


def _with_new_names(made_by: dict[str, Any]) -> dict[str, Any]:
    """Run.options() as an older version recorded them, with the new names of a recipe's keys."""
    if isinstance(made_by.get("recipe"), dict):
        return made_by | {"recipe": renamed(made_by["recipe"])}
    if isinstance(made_by.get("of"), dict):
        return made_by | {"of": {part: _with_new_names(options) for part, options in made_by["of"].items()}}
    return made_by


def _refuse_changed_code(run: Run, version: str) -> None:
    if (now := code_version()) != version:
        raise UserError(
            f"{run.name}, seed {run.seed}: the commit was {version} at the start of the run and is {now} "
            f"now. Check out {version} and run the experiment again, or remove {run.directory}."
        )


def _train(run: Run, commands: Commands, data_lock: Lock) -> dict[str, Any]:
    recipe = variant_recipe(run.experiment, run.name, run.seed)
    path = run.directory / "recipe.yaml"
    with temporary_then_rename(path) as temporary:
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    with data_lock:
        _make_data(run, commands, recipe)
    commands.import_libraries(megatron=True)  # before the clock starts: the imports do not count as training
    start = time.perf_counter()
    _command(run, commands, [sys.executable, *TRAINING.module, "--recipe", str(path)], megatron=True)
    trained = time.perf_counter() - start
    require_whole_training(recipe)
    _command(run, commands, [sys.executable, *EXPORT.module, "--recipe", str(path)], megatron=True)
    steps = [row for row in read_metrics(run.directory / "checkpoints" / METRICS) if row["kind"] == STEP]
    return {
        "data": instructions_sha256(recipe),
        "steps": steps[-1]["iteration"],
        "tokens": sum(row["tokens"] for row in steps),
        "training_seconds": trained,
    }


def _make_data(run: Run, commands: Commands, recipe: Recipe) -> None:
    """Runs the unfinished data stages, as `megatron-fuse run --until "fusion data"` does.

    That command would start one interpreter for itself and one for every stage. Here they are forks.
    """
    check_files(recipe)
    resolved = write_resolved_recipe(recipe)
    for works in steps(recipe, TEXT.name).values():
        if not is_done(works, recipe):
            _command(run, commands, [sys.executable, *works[0].stage.module, "--recipe", str(resolved)])


def instructions_sha256(recipe: Recipe) -> str:
    return Context(recipe).open(INSTRUCTIONS).sha256


def _merge(run: Run, commands: Commands, merge: Merge) -> dict[str, Any]:
    models = {part.row: str(part.model) for part in run.parts}
    command = [*_FUSE, "merge", "--method", merge.method, "--output", str(run.model)]
    command += [part for name in merge.models for part in ("--model", models[name])]
    command += ["--dtype", "fp32"]
    command += ["--base", models[merge.base]] if merge.base else []
    command += [part for flag, value in merge.options.items() for part in (f"--{flag}", str(value))]
    _command(run, commands, command)
    return {}


def _evaluate(run: Run, commands: Commands, split: str) -> dict[str, Any]:
    output = run.directory / f"measured-{split}.json"
    places = {
        "model": run.model,
        "output": output,
        "split": split,
        "seed": run.seed,
        "scenario": run.scenario,
    }
    _command(run, commands, [word.format(**places) for word in command_words(run.experiment.evaluate)])
    try:
        measured = checked(Metrics, {"metrics": read_json(output)}, str(output))
    except (OSError, UserError) as error:
        raise RunFailed(
            f"{run.name}, seed {run.seed}: the command `evaluate` wrote no {{metric: {{value, n}}}} ({error})"
        ) from error
    output.unlink()
    return measured.model_dump()["metrics"]


def command_words(text: str) -> list[str]:
    """The words of a command line in an experiment's file.

    `python` stands for the interpreter of this process.
    """
    words = command_parts(text)
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def _command(run: Run, commands: Commands, words: Sequence[str], *, megatron: bool = False) -> None:
    """Runs a command and appends its output to the run's log. Raises RunFailed if its exit code is not 0."""
    log = run.directory / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    shown_words = words[1:] if words[0] == sys.executable else words
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(shown_words)}\n")
    if code := commands.run(words, log, megatron=megatron):
        last = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ][-3:]
        raise RunFailed(
            f"{run.name}, seed {run.seed}: {_name(shown_words)} ended with exit code {code}. The last lines "
            f"of {log}:\n  " + "\n  ".join(last)
        )


def _name(words: Sequence[str]) -> str:
    """The name of a command line in messages: the script, or the module and its command."""
    if words[0] != "-m":
        return words[0]
    return " ".join(takewhile(lambda word: not word.startswith("-"), words[1:]))
