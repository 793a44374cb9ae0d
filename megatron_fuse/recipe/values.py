"""The types of values of options. Each has limits that no real run reaches: a value beyond them is a mistake.

A wrong value raises an error when the recipe is read, not after hours of work. Values are not converted: a
number is no truth value, and a text in quotes is no number.
"""

import argparse
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag

from megatron_fuse.errors import shortened

_PATH_BYTES, _NAME_BYTES = 4095, 255  # limits of Linux


class Options(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False
    )


def user_path(text: str | Path) -> Path:
    """A path that a user has written. `~` and `~NAME` at its beginning stand for home directories.

    Raises ValueError for an empty path, a path that no file system allows, or an unknown user. The message
    does not hold the path itself.
    """
    given = str(text)
    _refuse_no_line(given)
    path = Path(os.path.expanduser(given))
    if str(path).startswith("~"):
        if given.startswith("~"):
            user = shortened(given.partition("/")[0], 60)
            raise ValueError(
                f"there is no home directory of {user}: name an existing user, or write ./{user} for a "
                "directory of that name"
            )
        # The user wrote ./~x: without the absolute path, later code would expand the ~.
        path = Path.cwd() / path
    name = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if name > _NAME_BYTES or len(os.fsencode(path)) > _PATH_BYTES:
        raise ValueError(
            f"a path must have at most {_PATH_BYTES} bytes and a name in it at most {_NAME_BYTES}; this one "
            f"has {len(os.fsencode(path))} and {name}"
        )
    return path


def path_argument(text: str) -> Path:
    """user_path as the type of an argument on the command line. Raises argparse.ArgumentTypeError."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} (given: {shortened(text, 80)!a})") from error


def _refuse_no_line(text: str) -> None:
    """Raises ValueError for a blank text, and for characters that no name or path has."""
    if not text.strip():
        raise ValueError("must not be empty: write the value, or remove the key")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(
                f"holds {character!a}, but a name or path must not hold control characters or halves of "
                "characters"
            )


def _line(text: str) -> str:
    _refuse_no_line(text)
    return text


def _model_place(text: str) -> str:
    """A directory or a hub name. Only a `~` at the beginning is expanded."""
    path = user_path(text)
    return str(path) if text.startswith("~") else text


@dataclass(frozen=True)
class UnlessZero:
    """A validator that allows 0 and values of at least `least`. Raises ValueError for values between."""

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
    Path,
    Strict(False),
    BeforeValidator(lambda value: user_path(value) if isinstance(value, str | Path) else value),
]
ModelPlace = Annotated[str, AfterValidator(_model_place)]
# A name, a title, a key of the user's rows.
Line = Annotated[str, Field(max_length=1000), AfterValidator(_line)]
# Becomes a directory name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]

# Counts
Positive = _whole(1, 10**9)
Count = _whole(0, 10**9)
Seed = _whole(0, 2**32 - 1)
# A whole number stays one in a resolved recipe. The tags are no keys: errors leave out names in brackets.
Epochs = Annotated[
    Annotated[int, Field(ge=1, le=10_000), Tag("[whole]")]
    | Annotated[float, Field(ge=0.001, le=10_000), Tag("[part]")],
    Discriminator(lambda value: "[part]" if isinstance(value, float) else "[whole]"),
]
Tokens = _whole(1, 2**24)  # of one sequence: the longest contexts have ten million
BatchTokens = _whole(1, 2**30)
Ranks = _whole(1, 2**20)
Rank = _whole(0, 2**20 - 1)  # counted from 0
Layers = _whole(1, 10_000)

# Numbers
Share = _number(1e-6, 1)
Temperature = _number(0.01, 100)
SamplingTemperature = _zero_or(0.01, 100)
Weight = _zero_or(1e-6, 1000)  # of one part of a loss or score
LearningRate = _number(1e-12, 10)
LeastLearningRate = _zero_or(1e-12, 10)
GradientNorm = _zero_or(1e-9, 1e9)
Decay = Annotated[float, Field(ge=0, lt=1)]


def limits(metadata: list[Any]) -> str:
    """The range in a field's metadata: `from 1 to 10`, `0 or from 0.01 to 100`; empty if it has no limits."""
    rules = (getattr(item, "func", None) for item in metadata)
    least = next((rule.least for rule in rules if isinstance(rule, UnlessZero)), None)
    bounds = {
        key: getattr(item, key) for item in metadata for key in ("ge", "le", "lt") if hasattr(item, key)
    }
    if not bounds:
        return ""
    low = "0 or from" if least is not None else "from"
    high = f"below {bounds['lt']}" if "lt" in bounds else f"to {bounds['le']}"
    return f"{low} {bounds['ge'] if least is None else least} {high}"
