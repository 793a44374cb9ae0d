"""Reads the prompts of an open-ended evaluation, in the forms of MT-bench and AlpacaEval.

    {question_id, category, turns: [text, ...], reference}              MT-bench
    {instruction, input, dataset or category, turn2: {instruction}}     AlpacaEval

Only turns, or instruction, is required.

Both may have answers that exist already, under `responses`: {model: text, or a list with a text per turn},
and those of the second turn also under `turn2.responses`. Other keys are ignored. docs/evaluation.md
describes all keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_fuse.errors import UserError
from megatron_fuse.instructions.json_files import read_json_rows
from megatron_fuse.storage.records import Text, parse_record, quoted
from megatron_fuse.text_safety import brief


@dataclass(frozen=True)
class Prompt:
    """One prompt. Every turn of the user is answered, and the answers to the turns are judged one by one.

    references: what is known to be right, by turn; None if nothing is. given: name of a model -> its answers
    by turn, perhaps not to all turns.
    """

    id: str
    category: str | None
    turns: Sequence[str]
    references: Sequence[str | None]
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def _listed(value: Any) -> Any:
    """A text alone is that of the first turn."""
    return [value] if isinstance(value, str) else value


def _text_of_number(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_Id = Annotated[Text, BeforeValidator(_text_of_number)]
_Question = Annotated[Text, AfterValidator(_not_blank)]
_ByTurn = Annotated[list[Text], BeforeValidator(_listed), Field(min_length=1)]
_References = Annotated[list[Text | None], BeforeValidator(_listed)]


class _SecondTurn(BaseModel):
    model_config = ConfigDict(strict=True)

    instruction: _Question | None = None
    responses: dict[Text, Text] = {}


class _Row(BaseModel):
    """The keys that both forms have."""

    model_config = ConfigDict(strict=True)

    id: _Id | None = None
    question_id: _Id | None = None
    category: Text | None = None
    dataset: Text | None = None
    reference: _References | None = None
    responses: dict[Text, _ByTurn] = {}
    turn2: _SecondTurn | None = None

    @property
    def questions(self) -> list[str]:
        raise NotImplementedError


class _MtBench(_Row):
    turns: Annotated[list[_Question], Field(min_length=1)]

    @property
    def questions(self) -> list[str]:
        return self.turns


class _AlpacaEval(_Row):
    instruction: _Question
    input: Text | None = None

    @property
    def questions(self) -> list[str]:
        further = self.input or ""
        first = f"{self.instruction}\n\n{further}" if further.strip() else self.instruction
        second = self.turn2.instruction if self.turn2 else None
        return [first, *([second] if second else [])]


_NEEDED = "A prompt needs the key turns (MT-bench) or instruction (AlpacaEval); see docs/evaluation.md."


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a JSONL file or of a JSON list. limit: only the first so many; all rows are checked.

    Raises UserError, which names the line or the number of the row, for a row of another form, and for an id
    that two rows have.
    """
    if not path.is_file():
        raise UserError(f"{path}: the file is missing. Name a file of prompts (docs/evaluation.md).")
    prompts: dict[str, Prompt] = {}
    places: dict[str, int] = {}
    for number, row in read_json_rows(path):
        prompt = _prompt(row, number, f"{path}:{number}")
        if prompt.id in prompts:
            raise UserError(
                f"{path}:{number}: the id {quoted(prompt.id)} is that of row {places[prompt.id]} too. Give "
                "every prompt its own id."
            )
        prompts[prompt.id], places[prompt.id] = prompt, number
    if not prompts:
        raise UserError(f"{path}: has no prompts. Add rows. {_NEEDED}")
    return list(prompts.values())[:limit]


def _prompt(row: Mapping[str, Any], number: int, place: str) -> Prompt:
    form = _MtBench if "turns" in row else _AlpacaEval if "instruction" in row else None
    if form is None:
        keys = brief(", ".join(map(str, row)) or "none", 100)
        raise UserError(f"{place}: neither turns nor instruction is among the keys ({keys}). {_NEEDED}")
    read = parse_record(row, form, place, _NEEDED)
    questions = read.questions
    name = next((each for each in (read.question_id, read.id) if each is not None), str(number))
    category = read.category if read.category is not None else read.dataset
    return Prompt(name, category, questions, _references(read, place), _given(read, place))


def _references(row: _Row, place: str) -> list[str | None]:
    references, turns = row.reference or [], len(row.questions)
    if len(references) > turns:
        raise UserError(
            f"{place}: reference has {len(references)} texts, but the prompt has {turns} turns. Remove the "
            "others, or add the turns."
        )
    return [*references, *[None] * (turns - len(references))]


def _given(row: _Row, place: str) -> dict[str, list[str]]:
    """The answers of the row by model.

    Raises UserError for more answers than turns, and for an answer to the second turn without one to the
    first.
    """
    given = {model: list(answers) for model, answers in row.responses.items()}
    for model, answer in (row.turn2.responses if row.turn2 else {}).items():
        if len(given.get(model, [])) != 1:
            raise UserError(
                f"{place}: turn2.responses has an answer of {quoted(model)}, but responses has "
                f"{len(given.get(model, []))} of its answers instead of 1. Give its answer to the first turn "
                "under responses."
            )
        given[model].append(answer)
    for model, texts in given.items():
        if len(texts) > len(row.questions):
            raise UserError(
                f"{place}: there are {len(texts)} answers of {quoted(model)}, but the prompt has "
                f"{len(row.questions)} turns. Remove the others, or add the turns."
            )
    return given
