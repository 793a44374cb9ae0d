"""What other programs write of a teacher's distributions, brought to one form: rows of (ids, log-probabilities) about tokens.

A form is known by its columns (docs/captures.md describes them):

    top_ids, top_logprobs          ours                     about the supervised tokens alone
    token_ids, top_values          DistillKit, raw top-k    about a whole conversation, one row behind its input_ids
    prompt_logprobs                vLLM                     about a whole conversation, the first row null
    choices                        OpenAI's completions     about a whole conversation where the first row is null (echo)

Nothing is judged here but the shape of a row: imported.py compares tokens and probabilities with what they must be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class BadRowError(Exception):
    """Why a row cannot be used; whoever reads the file adds its place."""


@dataclass(frozen=True)
class GivenRows:
    """What a row of a file says about n tokens, as plain lists.

    whole: the tokens are those of the whole conversation, and more may follow; else of the supervised ones alone. ids and
    logprobs [n]: a token's likeliest alternatives and their log p at T = 1; token_logprobs [n]: its own, None where it has to be
    among these. logsumexp: by temperature [n], relative to the largest logit.
    """

    tokens: Sequence[int]
    whole: bool
    ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    token_logprobs: Sequence[float | None]
    logsumexp: dict[float, Sequence[float]]


def given_rows(row: dict[str, Any]) -> GivenRows:
    """Raises BadRowError for a row in no known form, and for columns that are missing or differ in length."""
    for column, read in _FORMS.items():
        if row.get(column) is not None:
            try:
                given = read(row)
                lengths = [(len(ids), len(values)) for ids, values in zip(given.ids, given.logprobs, strict=True)]
            except (LookupError, TypeError, AttributeError) as error:
                raise BadRowError(
                    f"{column} and what belongs to it are not in the form of docs/captures.md ({error!r})"
                ) from error
            for place, (ids, values) in enumerate(lengths):
                if ids != values:
                    raise BadRowError(f"token {place} has {ids} ids, but {values} log-probabilities")
            return given
    if row.keys() & {"compressed_logprobs", "packed_indices"}:
        raise BadRowError(
            "DistillKit's compressed columns are not read: write what its LogprobCompressor.decompress_to_sparse returns into "
            "the columns token_ids and top_values"
        )
    raise BadRowError(f"in no known form: it has {', '.join(row)}; a form is known by {', '.join(_FORMS)}")


def _ours(row: dict[str, Any]) -> GivenRows:
    tokens = _list(row, "token_ids")
    ids, logprobs, own = (_list(row, name, len(tokens)) for name in ("top_ids", "top_logprobs", "token_logprobs"))
    return GivenRows(tokens, False, ids, logprobs, own, _logsumexp(row, len(tokens)))


def _distill_kit(row: dict[str, Any]) -> GivenRows:
    """Row t is about token t + 1; there may be one about what follows the last."""
    tokens, ids = _list(row, "input_ids"), _list(row, "token_ids")
    if len(ids) - len(tokens) not in (-1, 0):
        raise BadRowError(f"token_ids has {len(ids)} rows for {len(tokens)} input_ids: one row less, or as many, fit")
    own = _list(row, "token_logprobs", len(ids)) if row.get("token_logprobs") is not None else [None] * len(ids)
    columns = ([[], *ids], [[], *_list(row, "top_values", len(ids))], [None, *own])
    lse = {temperature: [None, *values][: len(tokens)] for temperature, values in _logsumexp(row, len(ids)).items()}
    return GivenRows(tokens, True, *(column[: len(tokens)] for column in columns), lse)


def _vllm(row: dict[str, Any]) -> GivenRows:
    """{id: {logprob, rank, ...}}: the likeliest, and the token itself where it is not among them."""
    tokens, given = _list(row, "prompt_token_ids"), _list(row, "prompt_logprobs")
    if len(given) != len(tokens):
        raise BadRowError(f"prompt_logprobs has {len(given)} items, prompt_token_ids {len(tokens)}")
    ids, logprobs, own = [], [], []
    for token, position in zip(tokens, given, strict=True):
        alternatives = {_token_id(key): value for key, value in (position or {}).items()}
        if position and token not in alternatives:
            raise BadRowError(f"prompt_logprobs has no entry for token {token} of prompt_token_ids")
        own.append(alternatives[token]["logprob"] if position else None)
        # The token itself is no alternative where others that are not given lie between.
        falling = sorted(alternatives.items(), key=lambda item: -item[1]["logprob"])
        likeliest = [item for place, item in enumerate(falling, 1) if (item[1].get("rank") or 0) <= place]
        ids.append([key for key, _ in likeliest])
        logprobs.append([value["logprob"] for _, value in likeliest])
    return GivenRows(tokens, True, ids, logprobs, own, _logsumexp(row, len(tokens)))


def _openai(row: dict[str, Any]) -> GivenRows:
    """choices[0].logprobs {tokens, token_logprobs, top_logprobs}, with tokens by their id (`token_id:29871`)."""
    given = row["choices"][0]["logprobs"]
    tokens = [_token_id(token) for token in given["tokens"]]
    top, own = given["top_logprobs"], given["token_logprobs"]
    ids = [[_token_id(key) for key in position or {}] for position in top]
    logprobs = [list((position or {}).values()) for position in top]
    if not len(tokens) == len(ids) == len(own):
        raise BadRowError(f"{len(tokens)} tokens, {len(own)} token_logprobs and {len(ids)} top_logprobs")
    whole = bool(own) and own[0] is None
    return GivenRows(tokens, whole, ids, logprobs, own, _logsumexp(row, len(tokens)))


_FORMS: dict[str, Callable[[dict[str, Any]], GivenRows]] = {
    "top_ids": _ours,
    "top_values": _distill_kit,
    "prompt_logprobs": _vllm,
    "choices": _openai,
}


def _list(row: dict[str, Any], name: str, length: int | None = None) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise BadRowError(
            f"{name} is {'missing' if value is None else f'a {type(value).__name__}'}: it has to be a list"
        )
    if length is not None and len(value) != length:
        raise BadRowError(f"{name} has {len(value)} items, there are {length} tokens")
    return value


def _logsumexp(row: dict[str, Any], length: int) -> dict[float, list[float]]:
    given = row.get("logsumexp") or {}
    try:
        return {float(key): _list(given, key, length) for key in given if given[key] is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise BadRowError('logsumexp is not a mapping from temperatures to lists, {"1": [...], "2": [...]}') from error


def _token_id(name: str) -> int:
    try:
        return int(name.removeprefix("token_id:"))
    except ValueError as error:
        raise BadRowError(
            f"{name!r} is no token id: texts do not tell tokens apart; ask the server for ids (vLLM: return_tokens_as_token_ids)"
        ) from error
