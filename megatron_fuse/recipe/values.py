"""The kinds of values that options take, each with the limits that no practitioner reaches: what is beyond them is a mistake.

A wrong value is refused when the recipe is read, not after hours of work. Values have the type that they are written in: a number
is no truth value, and a text in quotes no number.
"""

import argparse
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from megatron_fuse.errors import shortened

_PATH_BYTES, _NAME_BYTES = 4095, 255  # what Linux takes


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


def user_path(text: str | Path) -> Path:
    """A path that a user has written: `~` and `~NAME` at its beginning stand for home directories, everywhere.

    Raises ValueError for an empty path, one that no file system takes, or an unknown user; the message does not hold the path.
    """
    given = str(text)
    _refuse_no_line(given)
    path = Path(os.path.expanduser(given))
    if str(path).startswith("~"):
        if given.startswith("~"):
            user = shortened(given.partition("/")[0], 60)
            raise ValueError(
                f"there is no home directory for {user}: name an existing user, or write ./{user} for a directory of that name"
            )
        path = Path.cwd() / path  # ./~x, of which nobody may make a home directory later
    name = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if name > _NAME_BYTES or len(os.fsencode(path)) > _PATH_BYTES:
        raise ValueError(
            f"a path has at most {_PATH_BYTES} bytes and a name in it at most {_NAME_BYTES}; this has {len(os.fsencode(path))} and {name}"
        )
    return path


def path_argument(text: str) -> Path:
    """user_path as the type of a command line's argument."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} (given: {shortened(text, 80)!a})") from error


def _refuse_no_line(text: str) -> None:
    """ValueError for a blank text, and for characters that no name or path has."""
    if not text.strip():
        raise ValueError("it is empty: write the value, or leave out the key")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(
                f"it holds {character!a}: a name or path has no control characters or halves of characters"
            )


def _line(text: str) -> str:
    _refuse_no_line(text)
    return text


def _model_place(text: str) -> str:
    """A directory or a hub name, which stays as it is."""
    path = user_path(text)
    return str(path) if text.startswith("~") else text


@dataclass(frozen=True)
class UnlessZero:
    """The least value beside 0."""

    least: float

    def __call__(self, value: float) -> float:
        if 0 < value < self.least:
            raise ValueError(f"must be 0, or at least {self.least:g}")
        return value


def _whole(least: int, most: int) -> Any:
    return Annotated[int, Field(ge=least, le=most)]


def _number(least: float, most: float) -> Any:
    return Annotated[float, Field(ge=least, le=most)]


def _zero_or(least: float, most: float) -> Any:
    return Annotated[float, Field(ge=0, le=most), AfterValidator(UnlessZero(least))]


Precision = Literal["fp32", "bf16", "fp16"]

# Texts
Location = Annotated[
    Path, Strict(False), BeforeValidator(lambda of: user_path(of) if isinstance(of, str | Path) else of)
]
ModelPlace = Annotated[str, AfterValidator(_model_place)]
Line = Annotated[str, Field(max_length=1000), AfterValidator(_line)]  # a name, a title, a key of somebody's rows
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]  # becomes a directory name

# Counts
Positive = _whole(1, 10**9)
Count = _whole(0, 10**9)
Seed = _whole(0, 2**32 - 1)
Epochs = _whole(1, 10_000)
Tokens = _whole(1, 2**24)  # of one sequence: the longest contexts have ten million
BatchTokens = _whole(1, 2**30)
Ranks = _whole(1, 2**20)
Rank = _whole(0, 2**20 - 1)  # counted from 0
Layers = _whole(1, 10_000)

# Numbers
Share = _number(1e-6, 1)
Temperature = _number(0.01, 100)
SamplingTemperature = _zero_or(0.01, 100)
Weight = _zero_or(1e-6, 1000)  # of a part of a loss or score beside the others
LearningRate = _number(1e-12, 10)
LeastLearningRate = _zero_or(1e-12, 10)
GradientNorm = _zero_or(1e-9, 1e9)
Decay = Annotated[float, Field(ge=0, lt=1)]


def limits(metadata: list[Any]) -> str:
    """`from 1 to 10`, `0 or from 0.01 to 100`: what a field's metadata allows; empty where it sets no limits to numbers."""
    least = next((of.least for item in metadata if isinstance(of := getattr(item, "func", None), UnlessZero)), None)
    bounds = {key: getattr(item, key) for item in metadata for key in ("ge", "le", "lt") if hasattr(item, key)}
    if not bounds:
        return ""
    low = "0 or from" if least is not None else "from"
    high = f"below {bounds['lt']}" if "lt" in bounds else f"to {bounds['le']}"
    return f"{low} {bounds['ge'] if least is None else least} {high}"
