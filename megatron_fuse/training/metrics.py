"""metrics.jsonl: what every step, evaluation and timed save measured, one row each, in the order of the run.

    {"kind": "step", "iteration": 8, "phase": "co-fusion", "consumed samples": 120, "loss": 1.2, "ce/training": 1.0, ...}
    {"kind": "held-out", "iteration": 8, "ce/training": 1.1, "kl/training": 0.2, ...}
    {"kind": "save", "iteration": 8, "seconds/save-checkpoint": 1.5}

A number that is not finite is null, so a step whose `grad norm` is null was skipped.

Steps and evaluations hold the losses in nats per supervised token. For each mode whose KL has a weight they also hold `NAME/MODE`
and, by the source that teaches (of a mixture the one that weighs most), `NAME/MODE/SOURCE`, means over the supervised tokens with a
teacher's row: `teacher mass` is what the stored entries hold of the teacher's distribution, `student mass` what the student's
distribution at the KL's temperature holds on the same ids, `agreement` the share of tokens at which the student's likeliest id is
the likeliest stored one. A source without such tokens has no key. They come with the loss, and are not printed.

Steps that printed a line hold its speed and memory too: means over the steps since the line before, or since an evaluation or a
save. MFU and `TFLOP/s per GPU` count model FLOPs (throughput.py); `memory GiB` is the reporting rank's highest so far. From
--timing-log-level 1 on they hold `seconds/TIMER` (timing.py), of one step on the slowest rank, and saves have rows.
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
from megatron_fuse.recipe import Recipe
from megatron_fuse.storage import Workspace, read_jsonl, temporary_then_rename
from megatron_fuse.storage.records import Record, parse_record

METRICS, LOSS_CURVE = "metrics.jsonl", "loss.png"
STEP, HELD_OUT, SAVED = "step", "held-out", "save"


def metrics_directory(recipe: Recipe) -> Path:
    """WORKDIR/training; for a run with a --save of its own that directory, since several runs may share a workdir."""
    return recipe.training.save or Workspace(recipe.workdir).training


class MetricsFile:
    """Open for writing at its end, after the rows up to the iteration from which the run continues."""

    def __init__(self, path: Path, *, continue_at: int) -> None:
        """continue_at: steps done. What a killed run had written beyond them is dropped, all of it where they are 0."""
        self.path = path
        kept = [row for row in _whole_rows(path) if continue_at and row["iteration"] <= continue_at]
        with temporary_then_rename(path) as temporary:
            temporary.write_bytes(b"".join(map(_line, kept)))
        self.skipped = sum(row["kind"] == STEP and row.get("grad norm") is None for row in kept)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        """One system call a row, which the kernel carries out as a whole if the process is killed during it.

        Raises UserError where the disk is full.
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
    """phase and loss: of steps. All other keys hold numbers, null if they were not finite."""

    kind: Literal["step", "held-out", "save"]
    iteration: NonNegativeInt
    phase: str | None = None
    loss: float | None = None
    __pydantic_extra__: dict[str, float | None]

    @model_validator(mode="after")
    def _whole(self) -> "_Row":
        if self.kind == STEP and not {"phase", "loss"} <= self.model_fields_set:
            raise ValueError("a step has a phase and a loss")
        return self


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows, none where there is no file; UserError for a line that is no row."""
    if not path.exists():
        return []
    rows = []
    for number, row in read_jsonl(path):
        parse_record(row, _Row, f"{path}:{number}", "restore the file or take the line out")
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows before the first that a full disk or a lost machine has cut off."""
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
