"""The whole evaluation: checks inputs, reads finished results, measures the others, and compares all."""

import gc
import itertools
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation import harness
from megatron_fuse.evaluation.benchmarks import Benchmark
from megatron_fuse.evaluation.comparison import Comparison, compare
from megatron_fuse.evaluation.data_files import check_files
from megatron_fuse.evaluation.models import EvaluatedModel, fingerprint
from megatron_fuse.evaluation.results import MODEL, Result, Settings, load_result, refuse_other, result_path
from megatron_fuse.storage import remove_abandoned, temporary_then_rename

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

Key = tuple[str, str]  # model, task


@dataclass(frozen=True)
class _Asked:
    """The inputs that all measurements of a call share.

    made_from: task -> what its results depend on beside the model.
    """

    output: Path
    data: Path | None
    settings: Settings
    batch_size: int | str
    made_from: Mapping[str, Mapping[str, Any]]
    fingerprints: Mapping[str, str]  # by model


def evaluate(
    models: Sequence[EvaluatedModel],
    benchmarks: Sequence[Benchmark],
    output: Path,
    *,
    data: Path | None = None,
    settings: Settings = Settings(),  # noqa: B008, frozen
    batch_size: int | str = 8,
    baseline: str | None = None,
) -> tuple[Comparison, dict[Key, str]]:
    """Measures every pair of model and benchmark without a result in OUTPUT.

    Writes OUTPUT/evaluation.{json,md,png}.

    data: directory of JSONL files, None for the data sets of the hub. baseline: the name of a model, None for
    the first.

    Returns the comparison and the failures: (model, task) -> what went wrong. One failure does not stop the
    other measurements. Raises UserError, before anything is measured, for errors in models, data or existing
    results.
    """
    names = [model.name for model in models]
    baseline = baseline or names[0]
    if baseline not in names:
        raise UserError(
            f"--baseline {baseline!r} is not one of the models. Choose one of {', '.join(names)}."
        )
    version = harness.harness_version()
    if data is not None:
        harness.stay_offline()
    made_from = {benchmark.name: _made_from(benchmark, data, settings, version) for benchmark in benchmarks}
    fingerprints = {model.name: fingerprint(model.directory) for model in models}
    asked = _Asked(output, data, settings, batch_size, made_from, fingerprints)
    results = _finished(asked)
    for name, benchmark in itertools.product(names, benchmarks):
        if (name, benchmark.name) in results:
            _log(results[name, benchmark.name], benchmark, "finished before")
    failures: dict[Key, str] = {}
    manager = None
    for model in models:
        missing = [benchmark for benchmark in benchmarks if (model.name, benchmark.name) not in results]
        if missing:
            manager = manager or harness.make_task_manager(data)
            for benchmark, result in _measure(model, missing, asked, manager):
                if isinstance(result, str):
                    failures[model.name, benchmark.name] = result
                else:
                    results[model.name, benchmark.name] = result
    comparison = compare(results, failures, names, benchmarks, baseline)
    from megatron_fuse.evaluation.page import write_comparison  # imports matplotlib and torch

    write_comparison(comparison, {"tasks": made_from, "models": fingerprints}, output)
    return comparison, failures


def _made_from(benchmark: Benchmark, data: Path | None, settings: Settings, version: str) -> dict[str, Any]:
    """The inputs of a benchmark that are known before it runs.

    The data sets of the hub are not among them: at the end the hashes of their questions are compared.
    """
    source = "hub" if data is None else "files"
    made_from = {**asdict(settings), "shots": benchmark.shots, "lm-eval": version, "data": source}
    if data is not None:
        made_from["task definition"] = harness.task_definition(benchmark)
        made_from |= {f"data {name}": digest for name, digest in check_files(benchmark, data).items()}
    return made_from


def _finished(asked: _Asked) -> dict[Key, Result]:
    """The results in OUTPUT for the tasks of this call, of any model.

    Raises UserError for a result that was made from other inputs.
    """
    results = {}
    for directory in sorted(path for path in asked.output.glob("*") if path.is_dir()):
        remove_abandoned(directory)
        for task, made_from in asked.made_from.items():
            path = result_path(asked.output, directory.name, task)
            if path.is_file():
                result = load_result(path)
                model = asked.fingerprints.get(directory.name, result.made_from.get(MODEL))
                refuse_other(path, result.made_from, {**made_from, MODEL: model})
                results[directory.name, task] = result
    return results


def _measure(
    model: EvaluatedModel, benchmarks: Sequence[Benchmark], asked: _Asked, manager: "TaskManager"
) -> Iterator[tuple[Benchmark, Result | str]]:
    """Measures one model on several benchmarks.

    Yields, for each, its result, which is saved, or what went wrong.
    """
    try:
        loaded = harness.load_model(model.directory, asked.batch_size, asked.settings)
    except Exception as error:  # transformers raises many types for missing or damaged files
        for benchmark in benchmarks:
            yield benchmark, _record_failure(model, benchmark, asked, error)
        return
    for benchmark in benchmarks:
        try:
            result = _measure_one(model, loaded, benchmark, asked, manager)
        # Any error of the harness, a tokenizer or the device: the other tasks go on.
        except Exception as error:
            yield benchmark, _record_failure(model, benchmark, asked, error)
            continue
        result.save(asked.output)
        _failure_path(model, benchmark, asked).unlink(missing_ok=True)
        _log(result, benchmark, f"{result.seconds:.1f} s")
        yield benchmark, result
    del loaded
    gc.collect()  # frees the memory of the device before the next model is loaded


def _measure_one(
    model: EvaluatedModel, loaded: "HFLM", benchmark: Benchmark, asked: _Asked, manager: "TaskManager"
) -> Result:
    begin = time.perf_counter()
    results = harness.run_task(loaded, benchmark, asked.data, asked.settings, manager)
    return Result(
        model=model.name,
        task=benchmark.name,
        made_from={**asked.made_from[benchmark.name], MODEL: asked.fingerprints[model.name]},
        directory=str(model.directory),
        batch_size=asked.batch_size,
        seconds=round(time.perf_counter() - begin, 2),
        positions=loaded.max_length,
        shortened=harness.count_shortened(loaded, results),
        questions=harness.questions_of(results),
        metrics=harness.metrics_of(results, benchmark.hub if asked.data is None else benchmark.local),
    )


def _log(result: Result, benchmark: Benchmark, how: str) -> None:
    metric = result.metrics.get(benchmark.metric)
    value = "-" if metric is None or metric.value is None else f"{100 * metric.value:.1f} %"
    logger.info(f"{result.model}, {benchmark.heading}: {value} of {len(result.questions)} questions, {how}")


def _failure_path(model: EvaluatedModel, benchmark: Benchmark, asked: _Asked) -> Path:
    return asked.output / model.name / f"{benchmark.name}.error.txt"


def _record_failure(model: EvaluatedModel, benchmark: Benchmark, asked: _Asked, error: Exception) -> str:
    """Writes the traceback to a file, and prints and returns one line about the failure."""
    path = _failure_path(model, benchmark, asked)
    with temporary_then_rename(path) as temporary:
        temporary.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    text = " ".join(f"{type(error).__name__}: {error}".split())
    line = f"failed with {text[:300]} (traceback in {path})"
    logger.error(f"{model.name}, {benchmark.heading}: {line}")
    return line
