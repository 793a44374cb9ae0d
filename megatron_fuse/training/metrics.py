"""metrics.jsonl: the measurements of every step, evaluation and timed save, one row each,
in the order of the run.

    {"kind": "step", "iteration": 8, "phase": "co-fusion", "consumed samples": 120, "loss": 1.2, ...}
    {"kind": "held-out", "iteration": 8, "ce/training": 1.1, "kl/training": 0.2, ...}
    {"kind": "save", "iteration": 8, "seconds/save-checkpoint": 1.5}

A number that is not finite is null. So a step whose `grad norm` is null was skipped.

Steps and evaluations hold the losses in nats per supervised token. For each mode whose KL has a weight they
also hold `NAME/MODE` and `NAME/MODE/SOURCE`. SOURCE is the teacher (of a mixture the source with the largest
weight). The values are means over the supervised tokens with a teacher's row:

    teacher mass    probability of the stored entries in the teacher's distribution
    student mass    probability of the same ids in the student's distribution, at the temperature of the KL
    agreement       share of tokens at which the student's likeliest id is the likeliest stored one

A source without such tokens has no key. These values come with the loss and are not printed.

Steps that printed a line also hold its speed and memory. Speeds are means over the steps since the last line,
evaluation or save. MFU and `TFLOP/s per GPU` count model FLOPs (throughput.py). `memory GiB` is the highest
value of the reporting rank so far. From --timing-log-level 1 on they hold `seconds/TIMER` (timing.py) of one
step on the slowest rank, and saves have rows of their own.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, model_validator

from megatron_fuse.errors import UserError
from megatron_fuse.storage import read_jsonl, temporary_then_rename
from megatron_fuse.storage.records import Record, parse_record

METRICS, LOSS_CURVE = "metrics.jsonl", "loss.png"
STEP, VALIDATION, SAVED = "step", "held-out", "save"


class MetricsFile:
    """metrics.jsonl, open for appending after the rows up to the iteration at which the run continues."""

    def __init__(self, path: Path, *, continue_at: int) -> None:
        """continue_at: steps done.

        Rows after that iteration, from a killed run, are dropped; with 0 all rows are.
        """
        self.path = path
        kept = [row for row in _whole_rows(path) if continue_at and row["iteration"] <= continue_at]
        with temporary_then_rename(path) as temporary:
            temporary.write_bytes(b"".join(map(_line, kept)))
        self.skipped = sum(row["kind"] == STEP and row.get("grad norm") is None for row in kept)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Appends one row with one system call, which the kernel completes even if the process is killed
        during it.

        Raises UserError if the file cannot be written, for example on a full disk.
        """
        line = _line({"kind": kind, "iteration": iteration, **values})
        try:
            whole = os.write(self._file, line) == len(line)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        if not whole:
            raise UserError(f"{self.path}: cannot be written ({os.strerror(errno.ENOSPC)})")

    def close(self) -> None:
        os.close(self._file)


class _Row(Record):
    """One row. Steps have phase and loss.

    All other keys hold numbers, or null for a number that is not finite.
    """

    kind: Literal["step", "held-out", "save"]
    iteration: NonNegativeInt
    phase: str | None = None
    loss: float | None = None
    __pydantic_extra__: dict[str, float | None]

    @model_validator(mode="after")
    def _whole(self) -> "_Row":
        if self.kind == STEP and not {"phase", "loss"} <= self.model_fields_set:
            raise ValueError("a step must have a phase and a loss")
        return self


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; none if there is no file. Raises UserError for a line that is no row."""
    if not path.exists():
        return []
    rows = []
    for number, row in read_jsonl(path):
        parse_record(row, _Row, f"{path}:{number}", "Restore the file, or remove the line.")
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows before the first incomplete one,
    which a full disk or the loss of a machine may leave."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            _Row.model_validate(row)
        except (ValueError, RecursionError):  # pydantic's ValidationError is a ValueError
            return
        if not line.endswith(b"\n"):
            return
        yield row
