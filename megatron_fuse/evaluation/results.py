"""One finished measurement: a model on a task, with the outcome of every question and all inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_fuse.errors import UserError
from megatron_fuse.storage import write_json
from megatron_fuse.storage.records import first_problem, quoted
from megatron_fuse.text_safety import brief

MODEL = "model fingerprint"  # key of made_from; the only one that may differ between the models of a table


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    limit: only so many questions of every task of the harness, None for all. max_new_tokens: of a generated
    answer, None for the limit of the task.
    """

    limit: int | None = None
    apply_chat_template: bool = False
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Metric:
    """value, standard_error: in [0, 1], as the harness gives them. outcomes: one per question.

    None: the number is not finite. The standard error of a single question is None too.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    value: float | None
    standard_error: float | None
    outcomes: Sequence[float | None]


@dataclass(frozen=True)
class Result:
    """The result of one model on one task.

    questions: `TASK/INDEX HASH` of each question; the hash covers its whole row. metrics: the harness's name
    `metric,filter` -> numbers. made_from: everything that decides the numbers. positions: most tokens that
    the model reads. shortened: number of questions whose prompt lost its beginning, because the model reads
    fewer tokens.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    task: str
    made_from: Mapping[str, Any]
    directory: str
    batch_size: int | str
    seconds: float
    positions: int
    shortened: int
    questions: Sequence[str]
    metrics: Mapping[str, Metric]

    def save(self, output: Path) -> None:
        write_json(result_path(output, self.model, self.task), asdict(self))


_RESULT = TypeAdapter(Result)


def result_path(output: Path, model: str, task: str) -> Path:
    return output / model / f"{task}.json"


def load_result(path: Path) -> Result:
    """A result from its file.

    Raises UserError if no evaluation wrote the file, or if a metric does not have one outcome for every
    question.
    """
    fix = "Remove the file to measure again."
    try:
        result = _RESULT.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: not a result of an evaluation ({first_problem(error)}). {fix}") from error
    for name, metric in result.metrics.items():
        if len(metric.outcomes) != len(result.questions):
            raise UserError(
                f"{path}: metrics.{brief(name, 60)} has {len(metric.outcomes)} outcomes for "
                f"{len(result.questions)} questions. {fix}"
            )
    return result


def refuse_other(path: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError if an existing result was made from other inputs than this call has.

    recorded, wanted: made_from of the result and of this call. path: the file of the result.
    """
    for key in sorted(recorded.keys() | wanted.keys()):
        if recorded.get(key) != wanted.get(key):
            raise UserError(
                f"{path}: the file was made with {brief(key, 60)} {quoted(recorded.get(key), 120)}, but this "
                f"call has {quoted(wanted.get(key), 120)}. Give another --output, or remove the file to "
                "measure again."
            )
