"""Evaluation: lm-evaluation-harness on several models side by side, with standard errors and paired
differences.

    OUTPUT/MODEL/TASK.json        one finished measurement: metrics, outcome of every question, inputs
    OUTPUT/MODEL/TASK.error.txt   the traceback of one that failed, until it succeeds
    OUTPUT/evaluation.{json,md,png}   the table of all models of the last call

The harness, torch and transformers are imported when a measurement begins, not before.
"""

from megatron_fuse.evaluation.benchmarks import BENCHMARKS, GROUPS, Benchmark, benchmarks_named
from megatron_fuse.evaluation.comparison import Comparison, Difference, compare, paired_difference
from megatron_fuse.evaluation.models import EvaluatedModel, models_named
from megatron_fuse.evaluation.results import Metric, Result, Settings
from megatron_fuse.evaluation.run import evaluate

__all__ = [
    "BENCHMARKS",
    "GROUPS",
    "Benchmark",
    "Comparison",
    "Difference",
    "EvaluatedModel",
    "Metric",
    "Result",
    "Settings",
    "benchmarks_named",
    "compare",
    "evaluate",
    "models_named",
    "paired_difference",
]
