"""Run variants of one recipe over several seeds, and report which differences are larger than chance.

    megatron-fuse experiments examples/skills/experiments.yaml                      # its first table
    megatron-fuse experiments examples/skills/experiments.yaml --only sources kl_form
    megatron-fuse experiments EXPERIMENT.yaml --split dev       # for choices; test is for reports
    megatron-fuse experiments EXPERIMENT.yaml ... --report docs/RESULTS.md   # the tables from the CSVs

Finished runs are kept, and interrupted runs continue. If seeds are added to the list, only the new ones run.
Results go to the experiment's CSV, one row per variant, seed and metric, also if the command is interrupted.
With --skip-measured, an experiment continues on another machine from the CSV alone.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Name, checked_value, path_argument
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say

if TYPE_CHECKING:
    from megatron_fuse.experiments.experiment import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiments",
        type=path_argument,
        nargs="+",
        metavar="EXPERIMENT",
        help="YAML files of experiments (their keys: megatron_fuse/experiments/experiment.py)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TABLE",
        help="tables whose runs are made; default: the first",
    )
    parser.add_argument("--split", help="data split to measure on; default: that of the experiment")
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of runs at the same time, with one thread each"
    )
    parser.add_argument(
        "--skip-measured",
        action="store_true",
        help="do not make runs whose results are in the CSV already, of the same commit, options and command "
        "`evaluate`",
    )
    parser.add_argument(
        "--report",
        type=path_argument,
        help="write the report of the CSV files to this Markdown file, and run nothing",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.report:
        _report(arguments.experiments, arguments.split, arguments.report)
        return
    if len(arguments.experiments) > 1:
        raise UserError(
            "several experiments are given, but only --report takes more than one. Run the experiments one "
            "after the other."
        )
    with importing():
        from megatron_fuse.experiments.layers import load_experiment
        from megatron_fuse.experiments.runner import run_experiment
    (path,) = arguments.experiments
    experiment = load_experiment(path)
    split = _split(arguments.split, experiment.split)
    try:
        failed = run_experiment(
            experiment,
            path,
            tables=arguments.only,
            split=split,
            jobs=arguments.jobs,
            skip_measured=arguments.skip_measured,
        )
    except KeyboardInterrupt:
        _write_results(experiment, path, split)
        raise
    _write_results(experiment, path, split)
    if failed:
        raise UserError(
            f"{len(failed)} runs failed; the finished runs are kept. Fix the causes and run this command "
            "again:\n  " + "\n  ".join(failed)
        )


def _write_results(experiment: "Experiment", path: Path, split: str) -> None:
    """Writes the results of all finished runs into the CSV, and the report of the CSV into the workdir."""
    with importing():
        from megatron_fuse.experiments.report import Reported, write_report
        from megatron_fuse.experiments.results import (
            collect_results,
            earlier_results,
            read_results,
            write_results,
        )
    collected = collect_results(experiment, split)
    if not collected and not experiment.results.exists():
        return
    if lost := write_results(experiment, collected, split):
        some = f"{', '.join(lost[:5])} and {len(lost) - 5} more" if len(lost) > 6 else ", ".join(lost)
        say(
            f"{experiment.results}: without the rows of {some}, which are of another commit, data, options "
            f"or seed. These rows are in {earlier_results(experiment)}"
        )
    results = [result for result in read_results(experiment.results) if result.split == split]
    report = experiment.workdir / f"report-{split}.md"
    write_report([Reported(experiment, results, _command(path))], report)
    say(f"{experiment.results}: {len(results)} results; tables: {report}")


def _report(paths: list[Path], split: str | None, output: Path) -> None:
    """Writes the report of the experiments from their CSV files alone."""
    with importing():
        from megatron_fuse.experiments.layers import load_experiment
        from megatron_fuse.experiments.report import Reported, write_report
        from megatron_fuse.experiments.results import read_results
    reported = []
    for path in paths:
        experiment = load_experiment(path)
        wanted = _split(split, experiment.split)
        results = [result for result in read_results(experiment.results) if result.split == wanted]
        reported.append(Reported(experiment, results, _command(path)))
    write_report(reported, output)
    say(f"{output}: written from {', '.join(str(each.experiment.results) for each in reported)}")


def _split(given: str | None, default: str) -> str:
    """The split.

    A given one must be valid as the key `split` of the file, because it becomes part of a file name.
    """
    return default if given is None else checked_value(Name, given, "--split")


def _command(path: Path) -> str:
    return f"megatron-fuse experiments {path}"
