"""Reads teachers' distributions of other programs into one form: ids and log-probabilities per token.

A form is recognised by its columns (docs/captures.md describes them):

    top_ids, top_logprobs          ours                     only the supervised tokens
    token_ids, top_values          DistillKit, raw top-k    a whole conversation; row t: token t + 1
    prompt_logprobs                vLLM                     a whole conversation; the first row is null
    choices                        OpenAI's completions     a whole conversation if the first row is null

OpenAI's first row is null if the request had `echo`. Only types and lengths are checked here. imported.py
checks tokens and probabilities.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict  # that of typing is refused by pydantic before Python 3.12

from megatron_fuse.storage.records import first_problem, quoted
from megatron_fuse.text_safety import brief


class BadRowError(Exception):
    """The reason why a row cannot be used. The reader of the file adds the place."""


@dataclass(frozen=True)
class GivenRows:
    """The content of a file's row about n tokens, as plain lists.

    whole: whether the tokens are those of the whole conversation, perhaps with more after it; if not, they
    are only the supervised ones. ids, logprobs [n]: a token's likeliest alternatives and their log p at T =
    1. token_logprobs [n]: the token's own log p, None if it must be among the alternatives. logsumexp: per
    temperature [n], relative to the largest logit; None only before the first row.
    """

    tokens: Sequence[int]
    whole: bool
    ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    token_logprobs: Sequence[float | None]
    logsumexp: Mapping[float, Sequence[float | None]]


class _Columns(BaseModel):
    """Columns with strict types: true is not a number, and 1.0 is not a token id.

    Numbers may be NaN or infinite here.
    """

    model_config = ConfigDict(strict=True)


_LogSumExps = dict[str, list[float | None] | None] | None


class _Ours(_Columns):
    token_ids: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    token_logprobs: list[float | None]
    logsumexp: _LogSumExps = None

    def given(self) -> GivenRows:
        n = len(self.token_ids)
        _same_length(
            n, top_ids=self.top_ids, top_logprobs=self.top_logprobs, token_logprobs=self.token_logprobs
        )
        lse = _by_temperature(self.logsumexp, n)
        return GivenRows(self.token_ids, False, self.top_ids, self.top_logprobs, self.token_logprobs, lse)


class _DistillKit(_Columns):
    """Row t is about token t + 1. A last row may be about the token after the last one."""

    input_ids: list[int]
    token_ids: list[list[int]]
    top_values: list[list[float]]
    token_logprobs: list[float | None] | None = None
    logsumexp: _LogSumExps = None

    def given(self) -> GivenRows:
        n, rows = len(self.input_ids), len(self.token_ids)
        if rows - n not in (-1, 0):
            raise BadRowError(
                f"token_ids has {rows} rows for {n} input_ids. It must have as many rows as input_ids, or "
                "one row less."
            )
        token_logprobs = self.token_logprobs if self.token_logprobs is not None else [None] * rows
        _same_length(rows, top_values=self.top_values, token_logprobs=token_logprobs)
        # Shifted by one, so that row t is about token t.
        lse = {t: [None, *values][:n] for t, values in _by_temperature(self.logsumexp, rows).items()}
        ids, logprobs = [[], *self.token_ids][:n], [[], *self.top_values][:n]
        return GivenRows(self.input_ids, True, ids, logprobs, [None, *token_logprobs][:n], lse)


class _Alternative(TypedDict):
    """A dict and no model, because a conversation has tens of thousands of them."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    logprob: float
    rank: NotRequired[int | None]


class _Vllm(_Columns):
    """{id: {logprob, rank, ...}}: the likeliest tokens, and the token itself if it is not one of them."""

    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[str, _Alternative] | None]
    logsumexp: _LogSumExps = None

    def given(self) -> GivenRows:
        tokens = self.prompt_token_ids
        if len(self.prompt_logprobs) != len(tokens):
            raise BadRowError(
                f"prompt_logprobs has {len(self.prompt_logprobs)} items, but prompt_token_ids has "
                f"{len(tokens)}"
            )
        ids, logprobs, token_logprobs = [], [], []
        for token, position in zip(tokens, self.prompt_logprobs, strict=True):
            alternatives = {_token_id(key): value for key, value in (position or {}).items()}
            if position and token not in alternatives:
                raise BadRowError(f"prompt_logprobs has no entry for token {token} of prompt_token_ids")
            token_logprobs.append(alternatives[token]["logprob"] if position else None)
            # Only entries without a gap in rank are the likeliest ones. The token
            # itself may have a higher rank than its place in the list: then
            # tokens that are not given lie between, and it is not an alternative.
            # Of equal ones the lower rank comes first: bf16 makes many equal.
            falling = sorted(
                alternatives.items(), key=lambda item: (-item[1]["logprob"], item[1].get("rank") or 0)
            )
            # NaN and infinity have no order. They stay here, so that imported.py refuses them.
            likeliest = [
                item
                for rank, item in enumerate(falling, 1)
                if (item[1].get("rank") or 0) <= rank or not item[1]["logprob"] < math.inf
            ]
            ids.append([key for key, _ in likeliest])
            logprobs.append([value["logprob"] for _, value in likeliest])
        lse = _by_temperature(self.logsumexp, len(tokens))
        return GivenRows(tokens, True, ids, logprobs, token_logprobs, lse)


class _Completion(_Columns):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(_Columns):
    logprobs: _Completion


class _OpenAI(_Columns):
    """choices[0].logprobs {tokens, token_logprobs, top_logprobs}, with tokens by id (`token_id:29871`)."""

    choices: list[_Choice] = Field(min_length=1)
    logsumexp: _LogSumExps = None

    def given(self) -> GivenRows:
        given = self.choices[0].logprobs
        tokens, token_logprobs = [_token_id(token) for token in given.tokens], given.token_logprobs
        ids = [[_token_id(key) for key in position or {}] for position in given.top_logprobs]
        logprobs = [list((position or {}).values()) for position in given.top_logprobs]
        if not len(tokens) == len(ids) == len(token_logprobs):
            lengths = (
                f"{len(tokens)} tokens, {len(token_logprobs)} token_logprobs and {len(ids)} top_logprobs"
            )
            raise BadRowError(lengths)
        whole = bool(token_logprobs) and token_logprobs[0] is None
        if None in token_logprobs[1:]:  # some JSON libraries write NaN as null
            raise BadRowError(f"token_logprobs.{token_logprobs.index(None, 1)}: must be a number, not null")
        lse = _by_temperature(self.logsumexp, len(tokens))
        return GivenRows(tokens, whole, ids, logprobs, token_logprobs, lse)


_FORMS: dict[str, type[_Ours | _DistillKit | _Vllm | _OpenAI]] = {
    "top_ids": _Ours,
    "top_values": _DistillKit,
    "prompt_logprobs": _Vllm,
    "choices": _OpenAI,
}


def given_rows(row: dict[str, Any]) -> GivenRows:
    """The content of a row in any known form.

    Raises BadRowError if the form is unknown, or if columns are missing or have another type or length.
    """
    form = next((form for column, form in _FORMS.items() if row.get(column) is not None), None)
    if form is None:
        if row.keys() & {"compressed_logprobs", "packed_indices"}:
            raise BadRowError(
                "DistillKit's compressed columns are not supported. Write what its "
                "LogprobCompressor.decompress_to_sparse returns into the columns token_ids and top_values."
            )
        keys = brief(", ".join(row))
        raise BadRowError(
            f"the form of the row is not known: the row has {keys}, but none of the columns "
            f"{', '.join(_FORMS)}"
        )
    try:
        given = form.model_validate(row).given()
    except ValidationError as error:
        raise BadRowError(f"{first_problem(error)} (docs/captures.md describes the form)") from error
    for index, (ids, values) in enumerate(zip(given.ids, given.logprobs, strict=True)):
        if len(ids) != len(values):
            raise BadRowError(f"token {index} has {len(ids)} ids, but {len(values)} log-probabilities")
    return given


def _same_length(length: int, **columns: Sequence[Any]) -> None:
    for name, values in columns.items():
        if len(values) != length:
            raise BadRowError(f"{name} has {len(values)} items, but there are {length} tokens")


def _by_temperature(given: _LogSumExps, length: int) -> dict[float, Sequence[float | None]]:
    by_temperature: dict[float, Sequence[float | None]] = {}
    for key, values in (given or {}).items():
        temperature = _number(key)
        if not 0 < temperature < math.inf:
            raise BadRowError(
                f'logsumexp: {quoted(key)} is not a temperature. Write it as {{"1": [...], "2": [...]}} '
                "(docs/captures.md)."
            )
        if values is None:
            continue
        if temperature in by_temperature:
            raise BadRowError(f"logsumexp: temperature {temperature:g} is given twice")
        _same_length(length, **{f"logsumexp at {temperature:g}": values})
        by_temperature[temperature] = values
    return by_temperature


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _token_id(name: str) -> int:
    try:
        return int(name.removeprefix("token_id:"))
    except ValueError as error:
        raise BadRowError(
            f"{quoted(name)} is not a token id, and several tokens can have the same text. Make the server "
            "return token ids (vLLM: return_tokens_as_token_ids)."
        ) from error
