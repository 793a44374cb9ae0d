"""The content of the project's JSON files as typed models.

Reading a file of another form raises UserError with file and key.

    plan.json         PlanRecord
    manifest.json     ManifestRecord
    shard-N.done      MarkerRecord

Models are strict: true is no number, 1.0 is no integer, NaN is no number at all. Keys that a model does not
know are kept.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)

from megatron_fuse.errors import UserError
from megatron_fuse.storage.files import read_sealed
from megatron_fuse.text_safety import brief

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

_LONGEST_NAME = 255  # bytes, in the file systems of Linux
_SHOWN = 60  # characters of a wrong value in a message


def _plain_name(name: str) -> str:
    """The name of a file in this directory, not of one in another directory."""
    is_plain = name not in ("", ".", "..") and PurePath(name).name == name and "\0" not in name
    if not is_plain or len(name.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise ValueError("must be the name of a file in this directory")
    return name


def _characters(text: str) -> str:
    """Rejects half a surrogate pair: "\\ud800" is valid JSON, but no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"must not hold half of a surrogate pair (character {error.start})") from error
    return text


Text = Annotated[str, AfterValidator(_characters)]
FileName = Annotated[str, AfterValidator(_plain_name)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A JSON object with known keys, and perhaps others."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """The keys and values of the file: without defaults that it lacks, with keys unknown here."""
        return self.model_dump(exclude_unset=True)


class RecordedFile(Record):
    bytes: NonNegativeInt
    sha256: Sha256


class PlanRecord(Record):
    format_version: int
    stage: str
    options: dict[str, Any]
    inputs: dict[str, str]
    shards: NonNegativeInt
    shard_names: list[FileName] | None = None


class ManifestRecord(PlanRecord):
    counts: dict[str, NonNegativeInt]
    files: dict[FileName, RecordedFile]


class MarkerRecord(Record):
    files: dict[FileName, RecordedFile]
    counts: dict[str, NonNegativeInt]
    together: list[str] = []


def read_record(path: Path, model: type[Model], fix: str | None = None) -> Model:
    """A JSON file as a model of its content. fix: what the user must do about a wrong file, for the error.

    Raises UserError, naming the file and the key, if it is no JSON object or not of this form.
    """
    fix = fix or "Restore the file. If a stage made it, you can also remove it and run the stage again."
    return parse_record(read_sealed(path), model, str(path), fix)


def parse_record(content: object, model: type[Model], place: str, fix: str) -> Model:
    """read_record for content that has been read already.

    place: the file, or file and line, for the error.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{place}: {first_problem(error)}. {fix}") from error


def read_typed_rows(path: Path, kind: type[T], fix: str | None = None) -> Iterator[T]:
    """The rows of a JSONL file that a stage wrote, as dataclasses or models.

    Raises UserError naming file, line and key.
    """
    fix = fix or f"Restore the file, or remove {path.parent} and run the stage again."
    # mypy believes that type[T] is not hashable.
    adapter = _adapter(kind)  # type: ignore[arg-type]
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield adapter.validate_json(line, strict=True)
                except ValidationError as error:
                    raise UserError(f"{path}:{number}: {first_problem(error)}. {fix}") from error


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation in one line: key, problem, value, and the number of others."""
    first, *others = error.errors(include_url=False, include_context=False)
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    key = f"{brief(key, _SHOWN)}: " if key else ""
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "missing":
        return f"{key}missing{more}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{key}{message}, not {quoted(first['input'])}{more}"


def quoted(value: Any, limit: int = _SHOWN) -> str:
    """A value as a message shows it: printable, on one line, of at most `limit` characters."""
    try:
        return brief(repr(value), limit)
    # The value is nested too deeply, or an integer has too many digits for repr.
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
