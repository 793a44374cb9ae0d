"""Run variants of one recipe over several seeds, and tell what differs by more than chance.

    python tools/run_experiments.py examples/skills/experiments.yaml                      # its first table
    python tools/run_experiments.py examples/skills/experiments.yaml --only sources kl_form
    python tools/run_experiments.py EXPERIMENT.yaml --split dev                           # for choices; test is for reports
    python tools/run_experiments.py EXPERIMENT.yaml ... --report docs/RESULTS.md          # the tables again, from the CSVs alone

What is finished is kept, and what was interrupted goes on; a longer list of seeds runs only the new ones. Results go to the
experiment's CSV, a row per variant, seed and metric.
"""

import argparse
from pathlib import Path

import megatron_fuse.start  # noqa: F401
from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.experiments import (
    Experiment,
    Reported,
    collect_results,
    load_experiment,
    read_results,
    run_experiment,
    write_report,
    write_results,
)
from megatron_fuse.recipe import Name, checked_value, path_argument
from megatron_fuse.text_safety import say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments",
        type=path_argument,
        nargs="+",
        metavar="EXPERIMENT",
        help="YAML (megatron_fuse/experiments/experiment.py)",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TABLE", help="tables to run; default: the first")
    parser.add_argument("--split", help="problems to measure with; default: the experiment's")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--report", type=path_argument, help="write the report of the CSVs to this Markdown file, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.report:
        reported = [_stored(path, arguments.split) for path in arguments.experiments]
        write_report(reported, arguments.report)
        say(f"{arguments.report}: written from {', '.join(str(of.experiment.results) for of in reported)}")
        return
    if len(arguments.experiments) > 1:
        raise UserError("run experiments one by one; only --report takes several")
    (path,) = arguments.experiments
    experiment = load_experiment(path)
    split = _split(arguments.split, experiment)
    failed = run_experiment(experiment, path, tables=arguments.only, split=split, jobs=arguments.jobs, progress=say)
    results = collect_results(experiment, split)
    if lost := write_results(experiment, results, split):
        say(f"{experiment.results}: without the rows of {', '.join(lost)}, which are of another commit, data or seed")
    report = experiment.workdir / f"report-{split}.md"
    write_report([Reported(experiment, results, _command(path))], report)
    say(f"{experiment.results}: {len(results)} results; tables: {report}")
    if failed:
        raise UserError(
            f"{len(failed)} runs failed, the others are kept; run this again after mending:\n  " + "\n  ".join(failed)
        )


def _stored(path: Path, split: str | None) -> Reported:
    experiment = load_experiment(path)
    wanted = _split(split, experiment)
    results = [result for result in read_results(experiment.results) if result.split == wanted]
    return Reported(experiment, results, _command(path))


def _split(given: str | None, experiment: Experiment) -> str:
    """By the rule for the key `split` in the file: it becomes part of a file's name."""
    return experiment.split if given is None else checked_value(Name, given, "--split")


def _command(path: Path) -> str:
    return f"python tools/run_experiments.py {path}"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
