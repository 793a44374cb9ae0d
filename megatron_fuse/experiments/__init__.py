"""Experiments: variants of one recipe over several seeds, measured side by side, reported with error bars."""

from megatron_fuse.experiments.experiment import Experiment, Table, load_experiment
from megatron_fuse.experiments.report import Reported, write_report
from megatron_fuse.experiments.results import collect_results, read_results, write_results
from megatron_fuse.experiments.runner import run_experiment

__all__ = [
    "Experiment",
    "Reported",
    "Table",
    "collect_results",
    "load_experiment",
    "read_results",
    "run_experiment",
    "write_report",
    "write_results",
]
