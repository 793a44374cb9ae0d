"""The rows of the files of an offline evaluation, by benchmark (docs/evaluation.md lists them).

Other keys of a row are ignored.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from megatron_fuse.storage.records import Text


class Question(BaseModel):
    """A row with one question. Strict: neither true nor "1" is an index."""

    model_config = ConfigDict(strict=True)


Options = Annotated[list[Text], Field(min_length=1)]


def _index_of(options: str, value: int, info: ValidationInfo) -> int:
    # 0 if the options themselves are wrong, which pydantic then reports.
    count = len(info.data.get(options, ()))
    if count and not 0 <= value < count:
        raise ValueError(f"must be the index of one of the {count} {options}")
    return value


class Arc(Question):
    query: Text
    choices: Options
    gold: int

    @field_validator("gold")
    @classmethod
    def _is_one(cls, value: int, info: ValidationInfo) -> int:
        return _index_of("choices", value, info)


class HellaSwag(Question):
    activity_label: Text
    ctx_a: Text
    ctx_b: Text
    endings: Options
    label: int

    @field_validator("label")
    @classmethod
    def _is_one(cls, value: int, info: ValidationInfo) -> int:
        return _index_of("endings", value, info)


class Mmlu(Question):
    subject: Text
    question: Text
    choices: Annotated[list[Text], Field(min_length=4, max_length=4)]
    answer: Literal["A", "B", "C", "D"] | Annotated[int, Field(ge=0, le=3)]


class _Targets(Question):
    choices: Options
    labels: list[Annotated[int, Field(ge=0, le=1)]]

    @field_validator("labels")
    @classmethod
    def _of_every_choice(cls, value: list[int], info: ValidationInfo) -> list[int]:
        if len(value) != len(info.data.get("choices", value)) or 1 not in value:
            raise ValueError("must have a label for every choice, at least one of them 1")
        return value


class TruthfulQA(Question):
    question: Text
    mc2_targets: _Targets


class WinoGrande(Question):
    context_options: Options
    continuation: Text
    gold: int

    @field_validator("gold")
    @classmethod
    def _is_one(cls, value: int, info: ValidationInfo) -> int:
        return _index_of("context_options", value, info)


class Gsm8k(Question):
    question: Text
    answer: Text
