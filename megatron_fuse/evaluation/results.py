"""One finished measurement: a model on a task, with the outcome of every question and everything that it was made from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.storage import read_json, write_json

MODEL = "model fingerprint"  # of what a result was made from, all that may differ between the models of a table


@dataclass(frozen=True)
class Settings:
    """limit: the first questions only, of every task of the harness. max_new_tokens: of a generated answer, None for the task's own."""

    limit: int | None = None
    apply_chat_template: bool = False
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Metric:
    """value and standard_error [0, 1] as the harness gives them, outcomes by question; None: not finite, or one question has no error."""

    value: float | None
    standard_error: float | None
    outcomes: Sequence[float | None]


@dataclass(frozen=True)
class Result:
    """questions: `TASK/INDEX HASH` of each, the hash over its whole row; metrics: the harness's name `metric,filter` -> numbers.

    made_from: what must be the same for the number to be the same. shortened: questions whose prompt lost its beginning, as the
    model reads fewer tokens.
    """

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


def result_path(output: Path, model: str, task: str) -> Path:
    return output / model / f"{task}.json"


def load_result(path: Path) -> Result:
    """Raises UserError for a file that no evaluation wrote."""
    content = read_json(path)
    try:
        metrics = {name: Metric(**metric) for name, metric in content.pop("metrics").items()}
        return Result(**content, metrics=metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of an evaluation ({error}): remove it to measure again") from error


def refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError where a result in the way was made from something else than what is asked for now."""
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{path}: was made with {key} {found.get(key)!r}, this call has {wanted.get(key)!r}: "
                "give another --output, or remove the file to measure again"
            )
