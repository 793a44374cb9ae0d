"""The files that runs write, as typed models.

Reading a file of another form raises UserError with the wrong key.

WORKDIR/experiment.json   Owner          runs/NAME/seed-N/begun.json             Begun
                                         runs/NAME/seed-N/result.json            Made
                                         runs/NAME/seed-N/evaluation-SPLIT.json  Evaluation
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from megatron_fuse.errors import UserError, shortened
from megatron_fuse.recipe import Line, checked
from megatron_fuse.storage import read_json


class Record(BaseModel):
    """A JSON object with these keys, and perhaps others."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class Owner(Record):
    experiment: str


class Begun(Record):
    options: dict[str, Any]
    commit: str = "unknown"


class Made(Begun):
    """A run whose model is complete.

    data, steps, tokens and training_seconds: only for variants, else None.
    """

    data: str | None = None
    steps: int | None = None
    tokens: int | None = None
    training_seconds: float | None = None


class Measured(Record):
    """The value of a metric over n problems."""

    value: float
    n: Annotated[int, Field(ge=0)]


class Evaluation(Record):
    command: str
    commit: str
    metrics: dict[Line, Measured]


class Metrics(Record):
    """The file that the `evaluate` command of an experiment writes."""

    metrics: dict[Line, Measured]


Kind = TypeVar("Kind", bound=Record)


def read_record(kind: type[Kind], path: Path) -> Kind:
    """The record in a file.

    Raises UserError with the wrong key, and with the file to remove so that the run is repeated.
    """
    try:
        return checked(kind, read_json(path), shortened(str(path), 200))
    except UserError as error:
        raise UserError(
            f"{shortened(str(error).removesuffix('.'), 450)}. Remove {shortened(str(path), 120)} and run the "
            "experiment again."
        ) from error
