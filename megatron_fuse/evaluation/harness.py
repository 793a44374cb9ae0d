"""The access to lm-evaluation-harness: loads a model, runs one task, and reads metrics from its results."""

import importlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_fuse.chat.templates import FIXED_DATE, render
from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.benchmarks import TASKS, Benchmark
from megatron_fuse.evaluation.results import Metric, Settings
from megatron_fuse.own_code import not_loadable
from megatron_fuse.progress import Progress
from megatron_fuse.storage import sha256_of_parts
from megatron_fuse.text_safety import brief

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


def harness_version() -> str:
    """The version of lm-eval. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("lm_eval").__version__
    except ImportError as error:
        raise UserError(
            f"lm-eval cannot be imported ({error}). Run pip install 'megatron-fuse[eval]'."
        ) from error


def stay_offline() -> None:
    """Keeps this process from asking the hub. Call it before Hugging Face's libraries are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def task_definition(benchmark: Benchmark) -> str:
    """sha256 over the YAML file of a task over files, and over the YAML files that it includes."""
    parts, name = [], f"{benchmark.local}.yaml"
    while name:
        content = (TASKS / name).read_bytes()
        parts.append(content)
        included = [
            line.split(b":")[1].strip() for line in content.splitlines() if line.startswith(b"include:")
        ]
        name = included[0].decode() if included else ""
    return sha256_of_parts(*parts)


def make_task_manager(data: Path | None) -> "TaskManager":
    """A manager with the tasks of this project.

    data: None adds the harness's own tasks, whose index takes some seconds.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=data is None)


def load_model(directory: Path, batch_size: int | str, settings: Settings) -> "HFLM":
    """A model for the harness. batch_size: number of sequences, or `auto`.

    Raises UserError for a model that cannot be loaded, or that has no chat template although the settings ask
    for one.
    """
    from lm_eval.models.huggingface import HFLM

    from megatron_fuse.huggingface.bars import without_bars
    from megatron_fuse.huggingface.loading import this_device
    from megatron_fuse.huggingface.loading_checks import check_layers
    from megatron_fuse.model.config_file import check_model_directory
    from megatron_fuse.model.weight_files import WeightFiles

    stated, weights = check_model_directory(directory), WeightFiles(directory)
    weights.open_all()
    check_layers(stated, weights, directory, str(directory))
    try:
        with _quiet(), without_bars():
            model = HFLM(
                pretrained=str(directory),
                device=str(this_device()),
                batch_size=batch_size,
                dtype="auto",
                trust_remote_code=False,
                # Else Llama's templates print the present date.
                chat_template_args={"date_string": FIXED_DATE},
            )
    except Exception as error:  # transformers and the harness raise many types for missing or damaged files
        raise not_loadable(directory, error) from error
    if settings.apply_chat_template and model.tokenizer.chat_template is None:
        raise UserError(
            f"{directory} has no chat template, which --apply-chat-template needs. Remove that option, or "
            "add a template."
        )
    if settings.apply_chat_template:
        _try_template(model.tokenizer, directory)
    return model


def _try_template(tokenizer: Any, directory: Path) -> None:
    """Renders one question under the limits of this project.

    The harness renders with transformers, which has no limits. Raises UserError if the template cannot be
    used.
    """
    question = [{"role": "user", "content": "Question"}]
    specials = {f"{name}_token": getattr(tokenizer, f"{name}_token") or "" for name in ("bos", "eos", "pad")}
    try:
        render(tokenizer.get_chat_template(), question, None, add_generation_prompt=True, **specials)
    except Exception as error:  # a template is a program: it may divide by zero
        raise UserError(f"{directory}: the chat template cannot be used: {brief(str(error))}") from error


def run_task(
    model: "HFLM", benchmark: Benchmark, data: Path | None, settings: Settings, manager: "TaskManager"
) -> Mapping[str, Any]:
    """The harness's results of one benchmark. data: directory of JSONL files, None for the hub.

    This sets up the tasks as `lm_eval.simple_evaluate` does, but without its list of the machine's packages:
    that list takes longer than a small task.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    with TemporaryDirectory() as arrow_files, _quiet(), _shown(benchmark.heading):
        loaded = manager.load(
            [benchmark.hub if data is None else local_task(benchmark, data, Path(arrow_files))]
        )
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=benchmark.shots)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            if settings.max_new_tokens is not None and task.get_config("output_type") == "generate_until":
                limit = {"max_gen_toks": settings.max_new_tokens}
                task.set_config(key="generation_kwargs", value=limit, update=True)
        return evaluate(
            lm=model,
            task_dict=loaded,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=True,
        )


def local_task(benchmark: Benchmark, data: Path, arrow_files: Path) -> dict[str, Any]:
    """The YAML task over the files of one directory.

    arrow_files: the directory in which `datasets` keeps its copies.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    task = load_yaml(TASKS / f"{benchmark.local}.yaml")
    files = {split: str(data / name) for split, name in task["dataset_kwargs"]["data_files"].items()}
    return task | {"dataset_kwargs": {"data_files": files, "cache_dir": str(arrow_files)}}


def metrics_of(results: Mapping[str, Any], task: str) -> dict[str, Metric]:
    """Every metric of a task or group: the number of the harness, and the outcome of every question."""
    metrics = {}
    for name, value in results["results"][task].items():
        metric, comma, filter_name = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            outcomes = [
                _finite(sample[metric]) for _, sample in _samples(results) if sample["filter"] == filter_name
            ]
            error = results["results"][task].get(f"{metric}_stderr,{filter_name}")
            metrics[name] = Metric(_finite(value), _finite(error), outcomes)
    return metrics


def questions_of(results: Mapping[str, Any]) -> list[str]:
    """`TASK/INDEX HASH` of every question, in the order of the outcomes.

    Several filters give a question only once.
    """
    return list(
        dict.fromkeys(f"{task}/{row['doc_id']} {row['doc_hash'][:16]}" for task, row in _samples(results))
    )


def count_shortened(model: "HFLM", results: Mapping[str, Any]) -> int:
    """Number of questions with a prompt that is longer than the model can read.

    The harness drops its beginning.
    """
    lengths: dict[str, int] = {}

    def length(text: str) -> int:
        if text not in lengths:
            lengths[text] = len(model.tok_encode(text))
        return lengths[text]

    def is_shortened(context: str, then: str | Mapping[str, Any]) -> bool:
        if isinstance(then, str):  # an answer: its last token is only predicted, not read
            return length(context) + length(then) > model.max_length + 1
        return length(context) > model.max_length - then.get("max_gen_toks", model.max_gen_toks)

    return len(
        {
            (task, row["doc_id"])
            for task, row in _samples(results)
            if any(is_shortened(*arguments) for arguments in row["arguments"])
        }
    )


def _samples(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for task, rows in results["samples"].items():
        for row in rows:
            yield task, row


def _finite(value: Any) -> float | None:
    """The value as float; None if it is not finite, or is the harness's "N/A"."""
    return float(value) if not isinstance(value, str | None) and math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the harness's warnings about every number of shots and every shortened prompt.

    count_shortened counts these.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _shown(what: str) -> Iterator[None]:
    """Shows the harness's work on a task by Progress, in the place of its tqdm bars."""
    from lm_eval.models import huggingface

    with ExitStack() as bars:  # closes what an error leaves open

        class Bar:
            """What the harness uses of tqdm."""

            def __init__(self, requests: Sequence[Any] = (), *, total: int | None = None, **_: Any) -> None:
                self.requests = requests
                self.progress = bars.enter_context(
                    Progress(what, "requests", len(requests) if total is None else total)
                )

            def __iter__(self) -> Iterator[Any]:
                for request in self.requests:
                    yield request
                    self.update(1)
                self.close()

            def update(self, count: int) -> None:
                self.progress.advance(count)

            def close(self) -> None:
                bars.close()

        theirs = huggingface.tqdm
        huggingface.tqdm = Bar
        try:
            yield
        finally:
            huggingface.tqdm = theirs
