"""Run variants of one recipe over several seeds, and tell what differs by more than chance.

    python tools/run_experiments.py examples/skills/experiments/main.yaml               # its first table
    python tools/run_experiments.py examples/skills/experiments/main.yaml --only sources kl_form
    python tools/run_experiments.py EXPERIMENT.yaml --split dev                          # for choices; test is for reports
    python tools/run_experiments.py EXPERIMENT.yaml --report docs/RESULTS.md             # the tables again, from the CSV alone

What is finished is kept, and what was interrupted goes on; a longer list of seeds runs only the new ones. Results go to the
experiment's CSV, a row per variant, seed and metric.
"""

import argparse
from pathlib import Path

from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.experiments import (
    collect_results,
    load_experiment,
    read_results,
    run_experiment,
    write_report,
    write_results,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="YAML file (megatron_fuse/experiments/experiment.py)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TABLE", help="tables to run; default: the first")
    parser.add_argument("--split", help="problems to measure with; default: the experiment's")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--report", type=Path, help="write the report of the CSV to this Markdown file, and run nothing"
    )
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment)
    split = arguments.split or experiment.split
    command = f"python tools/run_experiments.py {arguments.experiment}"
    if arguments.report:
        results = [result for result in read_results(experiment.results) if result.split == split]
        write_report(experiment, results, arguments.report, command)
        print(f"{arguments.report}: written from {experiment.results}")
        return
    failed = run_experiment(experiment, arguments.experiment, tables=arguments.only, split=split, jobs=arguments.jobs)
    results = collect_results(experiment, split)
    write_results(experiment.results, results, split)
    report = experiment.workdir / f"report-{split}.md"
    write_report(experiment, results, report, command)
    print(f"{experiment.results}: {len(results)} results; tables: {report}")
    if failed:
        raise UserError(
            f"{len(failed)} runs failed, the others are kept; run this again after mending:\n  " + "\n  ".join(failed)
        )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
