"""Scores from a file of the user, which replace a reward model."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example
from megatron_fuse.instructions.tables import read_table
from megatron_fuse.recipe import ScoreFile
from megatron_fuse.responses import Response
from megatron_fuse.storage import sha256_of_parts
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.rows import id_at, keys_shown, value_at
from megatron_fuse.text_safety import brief

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class _Score:
    value: float
    answer: str | None  # hash of the answer that was scored, if the row holds that answer
    line: int


@dataclass(frozen=True)
class GivenScores:
    """The scores of one file, by source and by example id."""

    path: Path
    by_source: dict[str, dict[str, _Score]]

    @property
    def sources(self) -> list[str]:
        return list(self.by_source)

    def check(self, source: str, examples: Iterable[Example]) -> None:
        """Raises UserError if the file scores this source's answer to none of the examples. Stops reading at
        the first one found."""
        known, missed = self._scores_of(source), []
        for example in examples:
            if example.id in known:
                return
            missed.append(example.id)
        raise UserError(
            f"{self.path}: none of its {len(known)} ids with a score of {source!r} is the id of an example "
            f"(the instructions have {_listed(missed)}; the file has {_listed(known)}). Name the file that "
            "was made for these instructions."
        )

    def of_source(self, source: str, examples: list[Example], responses: list[Response]) -> np.ndarray:
        """The scores float32 [n] of one source's answers. NaN if the file has none, and for an empty answer.

        Raises UserError for a source that the file does not hold,
        and for a score that was made for another answer.
        """
        known = self._scores_of(source)
        scores = np.full(len(examples), np.nan, dtype=np.float32)
        for row, (example, response) in enumerate(zip(examples, responses, strict=True)):
            score = known.get(example.id)
            if score is None or not response.response.strip():
                continue
            if score.answer not in (None, _answer_hash(response.response)):
                raise UserError(
                    f"{self.path}:{score.line}: this score is for another answer of {source!r} to "
                    f"{quoted(example.id)} than the present one. Score the present answers, or name the file "
                    "of the scored answers in the recipe."
                )
            scores[row] = score.value
        return scores

    def _scores_of(self, source: str) -> dict[str, _Score]:
        if source not in self.by_source:
            raise UserError(
                f"{self.path}: there is no score of {source!r}; its sources are "
                f"{brief(', '.join(self.by_source), 150)}. Use the same source names in both, or add the "
                "scores."
            )
        return self.by_source[source]


def given_scores(options: ScoreFile, where: str) -> GivenScores:
    """Reads all scores of a file, of all its sources. where: the recipe's key, for errors.

    Two forms of rows are read:
        {id, source, score}, with an optional `response`: the answer that was scored (white space at its ends
        does not matter) {id, scores: {source: score}}, with the mapping under options.scores
    null is no score. Raises UserError, which names the line, for a row without id and for a score that is no
    finite number in float32; with both lines for two different scores of one answer;
    and for a file without scores.
    """
    by_source: dict[str, dict[str, _Score]] = {}
    first = None
    for line, row in read_table(options.path, where):
        first = first or f"line {line} has {keys_shown(row)}"
        place = f"{options.path}:{line}"
        name = id_at(row, options.id, place)
        for source, score in _scores(options, row, line, place).items():
            scores = by_source.setdefault(source, {})
            other = scores.setdefault(name, score)
            if (other.value, other.answer) != (score.value, score.answer):
                raise UserError(
                    f"{place}: the answer of {quoted(source)} to {quoted(name)} is also scored in line "
                    f"{other.line}, with another score or for another text. Remove one of the two."
                )
    if not by_source:
        raise UserError(
            f"{options.path}: no row has a score: neither {{source, score}} nor a mapping from source to "
            f"score under {options.scores} ({where}.scores); {first or 'the file is empty'}"
        )
    return GivenScores(options.path, by_source)


def _scores(options: ScoreFile, row: dict[str, Any], line: int, place: str) -> dict[str, _Score]:
    """The scores of one row, by source."""
    mapping, answer = value_at(row, options.scores), None
    if mapping is None and "source" in row and "score" in row:
        source, response = row["source"], row.get("response")
        if not isinstance(source, str) or not isinstance(response, str | None):
            wrong, value = ("source", source) if not isinstance(source, str) else ("response", response)
            raise UserError(f"{place}: {wrong} is a {type(value).__name__}, not text")
        mapping = {source: row["score"]}
        answer = None if response is None else _answer_hash(response)
    if not isinstance(mapping, dict | None):
        raise UserError(
            f"{place}: {options.scores} is a {type(mapping).__name__}, not a mapping from source to score"
        )
    return {
        source: _Score(_number(value, source, place), answer, line)
        for source, value in (mapping or {}).items()
        if value is not None
    }


def _number(value: Any, source: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        raise UserError(
            f"{place}: the score of {quoted(source)} is {quoted(value)}, which is not a finite number in "
            "float32"
        )
    return float(value)


def _answer_hash(text: str) -> str:
    return sha256_of_parts(text.strip().encode("utf-8", "surrogatepass"))


def _listed(names: Iterable[str]) -> str:
    return ", ".join([*map(quoted, islice(names, 3)), "..."])
