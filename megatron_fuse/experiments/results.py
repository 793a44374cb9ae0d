"""All results of an experiment as one tidy table: a row per variant, seed, split and metric.

    variant, seed, split, metric, value, n, steps, tokens, seconds, commit, data, machine, date, options

variant: with its scenario before it, if the experiment has scenarios (SCENARIO/VARIANT).

value: the metric over n problems. steps, tokens (inputs without padding), seconds: of the training alone;
empty for models and merges. data: the hash of the seed's instructions. options: the hash of the run's
options and of the command `evaluate`, empty in files of older versions. One file never holds rows of
different commits or data.
"""

import csv
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import cache
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_fuse.errors import UserError, shortened
from megatron_fuse.experiments.experiment import Experiment, scenario_and_name
from megatron_fuse.experiments.layers import data_directory
from megatron_fuse.experiments.records import Evaluation, Made, read_record
from megatron_fuse.experiments.runs import Run, code_version, refuse_other_options
from megatron_fuse.storage import sha256_of_json, temporary_then_rename
from megatron_fuse.storage.records import first_problem
from megatron_fuse.text_safety import brief


@dataclass(frozen=True)
class Result:
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    variant: str
    seed: int
    split: str
    metric: str
    value: float
    n: int
    steps: int | None
    tokens: int | None
    seconds: float | None
    commit: str
    data: str
    machine: str
    date: str
    options: str = ""


_RESULT = TypeAdapter(Result)
_MAY_BE_EMPTY = ("steps", "tokens", "seconds")


def collect_results(experiment: Experiment, split: str) -> list[Result]:
    """The results of all finished runs, in the order of the experiment's file.

    Raises UserError if a run was made with other options than the experiment's file has now, by another
    commit of the code than the present one, or from other data than the other runs of its seed: such numbers
    must not be compared.
    """
    version, results, others = code_version(), [], dict[str, list[str]]()
    data: dict[Path, tuple[str, Run]] = {}
    for name in experiment.run_names:
        for seed in experiment.seeds:
            run = Run(experiment, name, seed)
            if not run.is_made():
                continue
            made = read_record(Made, run.directory / "result.json")
            refuse_other_options(run, made.options)
            finished = run.is_finished(split)
            commits = {
                made.commit,
                read_record(Evaluation, run.evaluation(split)).commit if finished else version,
            }
            for commit in sorted(commits - {version}):
                others.setdefault(commit, []).append(f"{name} (seed {seed})")
            if not finished:
                continue
            if made.data is not None:
                first, owner = data.setdefault(data_directory(experiment, name, seed), (made.data, run))
                if first != made.data:
                    raise UserError(
                        f"{run.directory} was trained on data {made.data[:12]}, but {owner.directory} on "
                        f"{first[:12]}. Remove the outdated one and run the experiment again."
                    )
            results += _rows(run, split, made)
    if others:
        (commit, runs), *_ = others.items()
        raise UserError(
            f"{experiment.workdir} holds {len(runs)} runs of commit {commit}, for example {runs[0]}, but the "
            f"current commit is {version}. Check out {commit}, or remove {experiment.workdir} and run the "
            "experiment again."
        )
    return results


def measured_runs(experiment: Experiment, split: str) -> set[Run]:
    """The runs whose results are in the experiment's CSV, perhaps from another machine.

    They are of the present commit, options and command `evaluate`.
    """
    if not experiment.results.exists():
        return set()
    version, names = code_version(), set(experiment.run_names)
    rows = [
        row
        for row in read_results(experiment.results)
        if (row.split, row.commit) == (split, version)
        and row.variant in names
        and row.seed in experiment.seeds
    ]
    runs = {Run(experiment, row.variant, row.seed): row.options for row in rows}
    return {run for run, options in runs.items() if options == options_hash(run)}


def options_hash(run: Run) -> str:
    """What the column `options` holds: a hash of the run's options and of the command that measures it."""
    return sha256_of_json(run.options() | {"evaluate": run.experiment.evaluate})[:12]


def _rows(run: Run, split: str, made: Made) -> list[Result]:
    path = run.evaluation(split)
    day, options = date.fromtimestamp(path.stat().st_mtime).isoformat(), options_hash(run)
    return [
        Result(
            variant=run.name,
            seed=run.seed,
            split=split,
            metric=metric,
            value=measured.value,
            n=measured.n,
            steps=made.steps,
            tokens=made.tokens,
            seconds=None if made.training_seconds is None else round(made.training_seconds, 1),
            commit=made.commit,
            data=(made.data or "")[:12],
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            date=day,
            options=options,
        )
        for metric, measured in read_record(Evaluation, path).metrics.items()
    ]


def write_results(experiment: Experiment, results: Sequence[Result], split: str) -> list[str]:
    """Writes the rows of a split into the experiment's CSV.

    Returns the names of which old rows of the split were removed. Old rows stay if they have the same commit
    and data as the new ones and the options of today, and are of another split, or of names and seeds of the
    experiment without new rows. All others go to the end of earlier_results, except those that the same code
    has measured again.
    """
    names = experiment.run_names
    new = {(row.variant, row.seed, row.split) for row in results}
    commits = {row.commit for row in results}
    data = {_data_key(row): row.data for row in results if row.data}

    @cache
    def options(variant: str, seed: int) -> str:
        return options_hash(Run(experiment, variant, seed))

    def stays(row: Result) -> bool:
        if row.variant not in names or row.seed not in experiment.seeds:
            return False
        fits = row.commit in commits and row.data in ("", data.get(_data_key(row), row.data))
        return fits and row.options in ("", options(row.variant, row.seed))

    if not results:
        return []
    before = read_results(experiment.results) if experiment.results.exists() else []
    old = [row for row in before if (row.variant, row.seed, row.split) not in new]
    staying, leaving = list[Result](), list[Result]()
    for row in old:
        (staying if stays(row) else leaving).append(row)
    rows = [*staying, *results]
    rows.sort(key=lambda row: (row.split != experiment.split, row.split, names.index(row.variant), row.seed))
    kept = {_measurement(row) for row in rows}
    if removed := [row for row in before if _measurement(row) not in kept]:
        _set_aside(earlier_results(experiment), removed)
    experiment.results.parent.mkdir(parents=True, exist_ok=True)
    with temporary_then_rename(experiment.results) as temporary:
        temporary.write_text(_csv_text(rows), encoding="utf-8")
    return sorted({row.variant for row in leaving if row.split == split})


def earlier_results(experiment: Experiment) -> Path:
    """The CSV of the rows that write_results has removed."""
    return experiment.results.with_suffix(".earlier.csv")


def _set_aside(path: Path, rows: Sequence[Result]) -> None:
    """Puts rows at the end of a file, except those that it has. It is not parsed: whatever is in it stays."""
    header, *lines = _csv_text(rows).splitlines(keepends=True)
    before = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else header
    there = set(before.splitlines(keepends=True))
    with temporary_then_rename(path) as temporary:
        text = before + "".join(line for line in lines if line not in there)
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def _csv_text(rows: Sequence[Result]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    return file.getvalue()


def _measurement(row: Result) -> tuple[str | int, ...]:
    """What decides the row's value."""
    return row.variant, row.seed, row.split, row.metric, row.commit, row.data, row.options


def _data_key(row: Result) -> tuple[str | None, int]:
    """What decides the data of a run: its scenario and its seed."""
    return scenario_and_name(row.variant)[0], row.seed


def read_results(path: Path) -> list[Result]:
    """The results in a CSV file.

    Raises UserError if the file is missing, or if write_results did not write it.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist. Run megatron-fuse experiments first.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return [_parsed(row, f"{shortened(str(path), 200)}:{rows.line_num}") for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{shortened(str(path), 200)}: not a file of results ({brief(str(error))}). Remove it and run "
            "the experiment again."
        ) from error


def _parsed(row: dict[str, str | None], place: str) -> Result:
    """A row of a CSV file as a Result. An empty cell is None if its column may be empty. Raises UserError."""
    cells = {name: None if name in _MAY_BE_EMPTY and cell == "" else cell for name, cell in row.items()}
    try:
        return _RESULT.validate_python(cells)
    except ValidationError as error:
        raise UserError(f"{place}: not a row of a file of results: {first_problem(error)}") from error
