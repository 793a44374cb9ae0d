"""What the report counts: facts of every example that is learned from, read from instructions, answers and
selections.

Legend: n examples, S sources in the recipe's order, R reward models in theirs. Validation examples are left
out: nothing is learned from them, and an evaluation on them is fair only if
nobody has looked at them before.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import INSTRUCTIONS, Example, example_shards
from megatron_fuse.responses import RESPONSES, Response, response_shards
from megatron_fuse.stages import Context
from megatron_fuse.storage import Shards

FLAGS = ("empty", "truncated", "refused", "unmatched")  # what an answer can be


@dataclass(frozen=True, eq=False)
class Answers:
    """How the sources answered: all arrays [n, S]; S = 0 where the recipe does not use the inference mode.

    characters int64; tokens int64: of each source's own tokenizer; same int64: equal numbers for identical
    texts within an example, 0 for what was left out and cannot win; empty, truncated, refused, unmatched
    bool: unmatched is what a file of answers has no row for, it is empty as well.
    """

    characters: np.ndarray
    tokens: np.ndarray
    same: np.ndarray
    empty: np.ndarray
    truncated: np.ndarray
    refused: np.ndarray
    unmatched: np.ndarray


@dataclass(frozen=True, eq=False)
class Observations:
    """numbers int64 [n]: places in the instructions; validation: examples left out. characters int64 [n]: of
    the ground truth;
    instruction_characters int64 [n]: of all messages of user and assistant before it.

    system, category int64 [n]: places in system_messages and categories, -1 = none. selections: mode -> the
    arrays of its selection (selection/choice.py), of these examples only. strongest: place of the reward
    model that breaks ties.
    """

    sources: list[str]
    reward_models: list[str]
    strongest: int
    rules: dict[str, str]  # mode -> its rule
    numbers: np.ndarray
    validation: int
    characters: np.ndarray
    truncated: np.ndarray
    instruction_characters: np.ndarray
    system: np.ndarray
    system_messages: list[str]
    category: np.ndarray
    categories: list[str]
    answers: Answers
    selections: dict[str, dict[str, np.ndarray]]


def observe(context: Context) -> Observations:
    """Raises UserError where a stage before is missing, or where the schedule learns from no source."""
    recipe = context.recipe
    modes = sorted(recipe.modes_with_teacher, reverse=True)  # the training mode first
    if not modes:
        raise UserError("schedule: no phase learns from a source, so no source has an advantage")
    selected = FusionDataset(recipe).selections
    instructions, responses = _open(context)
    system_messages, categories = dict[str, int](), dict[str, int]()
    # Validation, characters, truncated, instruction_characters, system, category.
    rows: list[tuple[int, ...]] = []
    answered: list[list[tuple[int, ...]]] = []
    unmatched = [_unmatched(shards) for shards in responses]
    for shard, examples in enumerate(instructions):
        for example, *answers in zip(examples, *(shards[shard] for shards in responses), strict=True):
            rows.append(
                (
                    example.is_validation,
                    len(example.response),
                    example.truncated,
                    sum(len(message["content"]) for message in example.messages),
                    _place(example.system, system_messages),
                    _place(example.category, categories),
                )
            )
            answered.append(_answer_columns(answers, [example.id in ids for ids in unmatched]))
    table = np.array(rows, np.int64)
    kept = table[:, 0] == 0
    selections = {
        mode: {name: array[kept] for name, array in selected[mode].arrays.items()} for mode in modes
    }
    answer_columns = np.array(answered, np.int64).reshape(len(table), len(responses), 3 + len(FLAGS))[kept]
    strongest = recipe.strongest
    reward_models = (
        recipe.voting_reward_models if "inference" in modes and recipe.selection.inference == "vote" else []
    )
    return Observations(
        sources=list(recipe.sources),
        reward_models=reward_models,
        strongest=reward_models.index(strongest) if reward_models and strongest is not None else 0,
        rules={mode: getattr(recipe.selection, mode) for mode in modes},
        numbers=np.flatnonzero(kept),
        validation=int((~kept).sum()),
        characters=table[kept, 1],
        truncated=table[kept, 2] != 0,
        instruction_characters=table[kept, 3],
        system=table[kept, 4],
        system_messages=list(system_messages),
        category=table[kept, 5],
        categories=list(categories),
        answers=_answers(answer_columns, selections),
        selections=selections,
    )


def read_texts(context: Context, numbers: list[int]) -> dict[int, tuple[Example, list[Response]]]:
    """The examples of these places in the instructions, with every source's answer where there are
    answers.
    """
    instructions, responses = _open(context)
    texts, first = dict[int, tuple[Example, list[Response]]](), 0
    for shard, examples in enumerate(instructions):
        wanted = [number for number in numbers if first <= number < first + len(examples)]
        responses_of_shard = [shards[shard] for shards in responses] if wanted else []
        texts |= {
            number: (examples[number - first], [answers[number - first] for answers in responses_of_shard])
            for number in wanted
        }
        first += len(examples)
    return texts


def _open(context: Context) -> tuple[Shards[list[Example]], list[Shards[list[Response]]]]:
    answering = context.recipe.sources if context.recipe.uses_inference_mode else []
    responses = [response_shards(context.open(RESPONSES, source)) for source in answering]
    return example_shards(context.open(INSTRUCTIONS)), responses


def _unmatched(responses: Shards[list[Response]]) -> set[str]:
    artifact = responses.artifact
    texts = [artifact.checked(path).read_text(encoding="utf-8") for path in artifact.files(".unmatched.txt")]
    return {name for text in texts for name in text.split("\n")}


def _place(text: str | None, places: dict[str, int]) -> int:
    """Number of a text among the different ones met so far."""
    return -1 if text is None else places.setdefault(text, len(places))


def _answer_columns(answers: list[Response], unmatched: list[bool]) -> list[tuple[int, ...]]:
    texts = [answer.response for answer in answers]
    return [
        (
            len(answer.response),
            answer.tokens,
            1 + texts.index(answer.response),
            not answer.response.strip(),
            answer.truncated,
            answer.refused,
            missing,
        )
        for answer, missing in zip(answers, unmatched, strict=True)
    ]


def _answers(columns: np.ndarray, selections: dict[str, Any]) -> Answers:
    """columns int [n, S, 7]: those of _answer_columns."""
    if not columns.shape[1]:
        columns = np.zeros((len(columns), 0, 3 + len(FLAGS)), np.int64)
        available = np.zeros((len(columns), 0), bool)
    else:
        available = selections["inference"]["available"] != 0
    characters, tokens, same = (columns[..., column] for column in range(3))
    flags = {name: columns[..., 3 + column] != 0 for column, name in enumerate(FLAGS)}
    return Answers(characters, tokens, np.where(available, same, 0), **flags)
