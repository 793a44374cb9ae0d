"""Checks a conversation's distributions that another program gave, in a file or as a server, and makes rows
of them.

Rows are refused if they are off by one token, or made with another tokenizer or another convention. Nothing
is guessed.
- The tokens must be those of the source's tokenizer and template.
- The probabilities of a row must not add up to more than one.
- If the text's token is among the likeliest entries, it must have the same probability there as by itself.
- The text's token cannot have probability 0.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from megatron_fuse.capture.distributions import SparseRows, kept_by_mass
from megatron_fuse.capture.forms import BadRowError, GivenRows
from megatron_fuse.chat import EncodedConversation
from megatron_fuse.recipe import Recipe
from megatron_fuse.storage.records import quoted
from megatron_fuse.tokenization import Tokenizer

# The errors of half precision in a file: nats, absolute and relative, and the mass of a row beyond one.
_ABSOLUTE, _RELATIVE, _MASS = 0.01, 0.005, 2e-3
# Nats. JSON has no -inf, so servers write a large negative number for it: vLLM -9999.0.
_LEAST = -1000.0


class MismatchError(Exception):
    """The given tokens are not those of the source's tokenizer and template."""


def checked_rows(
    given: GivenRows,
    conversation: EncodedConversation,
    recipe: Recipe,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    sums_of_entries: bool = False,
) -> SparseRows:
    """The rows of a conversation's supervised tokens, as the recipe captures them.

    vocab_size: the number of ids that the source's model knows. sums_of_entries: whether the log-sum-exp at
    another temperature than 1 is that of the known entries alone, if it is not given (docs/captures.md says
    for what that is exact); else a missing one is an error.
    Raises MismatchError for other tokens than ours, BadRowError for rows that cannot be used.
    """
    at = _positions(given, conversation, tokenizer)
    options, temperatures = recipe.capture, recipe.capture_temperatures
    ids, logprobs = _falling([given.ids[i] for i in at], [given.logprobs[i] for i in at])
    _check_entries(ids, logprobs, vocab_size)
    tokens = conversation.spans.tokens.astype(np.int64)
    token_logprobs = _own_logprobs(ids, logprobs, tokens, [given.token_logprobs[i] for i in at])
    sums = {t: [values[i] for i in at] for t, values in given.logsumexp.items()}
    if sums_of_entries:
        sums = {**_sums_of_entries(ids, logprobs, tokens, token_logprobs, temperatures), **sums}
    lse = _logsumexps(logprobs, sums, temperatures)
    # From here on the same as in distributions.py: entries
    # relative to the largest, and the recipe's filter.
    relative = (logprobs - logprobs[:, :1])[:, : options.top_k].astype(np.float32)
    keep = kept_by_mass(
        torch.from_numpy(relative),
        torch.from_numpy(lse[:, 0]),
        top_p=options.top_p,
        filter=options.filter,
        temperature=temperatures[0],
    ).numpy()
    return SparseRows(
        counts=keep.sum(1).astype(np.uint8),
        ids=ids[:, : options.top_k][keep].astype(np.int32),
        logits=relative[keep],
        lse=lse,
        token_logprobs=token_logprobs.astype(np.float32),
        vocab_size=vocab_size,
    )


def _positions(given: GivenRows, conversation: EncodedConversation, tokenizer: Tokenizer) -> list[int]:
    """The indices of the supervised tokens in the given row.

    Raises MismatchError at the first token that is not ours.
    """
    own_tokens = conversation.ids if given.whole else conversation.spans.tokens
    given_tokens = _matrix([given.tokens], whole=True)[0]
    shared = min(len(own_tokens), len(given_tokens))
    different = np.flatnonzero(given_tokens[:shared] != own_tokens[:shared])
    if (
        len(different)
        or len(given_tokens) < len(own_tokens)
        or (len(given_tokens) > len(own_tokens) and not given.whole)
    ):
        index = int(different[0]) if len(different) else shared
        part = "conversation" if given.whole else "response"
        raise MismatchError(
            f"token {index} of the {part} is {_shown(tokenizer, given_tokens, index)}, but the source's "
            f"tokenizer gives {_shown(tokenizer, own_tokens, index)}"
        )
    return np.flatnonzero(conversation.supervised).tolist() if given.whole else list(range(len(own_tokens)))


def _shown(tokenizer: Tokenizer, tokens: np.ndarray, index: int) -> str:
    if index >= len(tokens):
        return "missing"
    token = int(tokens[index])
    if not 0 <= token < tokenizer.vocab_size:
        return str(token)
    return f"{token} ({tokenizer.token_bytes[token] or tokenizer.token_text(token)!r})"


def _matrix(rows: Sequence[Sequence[Any]], *, whole: bool) -> np.ndarray:
    """Rows of numbers of different lengths as one matrix [n, longest].

    Whole numbers become int64, filled up with -1. Others become float64, filled up with -inf; None becomes
    NaN.
    Raises BadRowError for a whole number beyond 64 bits.
    """
    lengths = np.array([len(row) for row in rows])
    values = list(chain.from_iterable(rows))
    try:
        flat = np.array(values, np.int64 if whole else np.float64)
    except OverflowError as error:
        wrong = next(value for value in values if not -(2**63) <= value < 2**63)
        raise BadRowError(f"{quoted(wrong)} is too large for a token id") from error
    matrix = np.full(
        (len(rows), lengths.max(initial=0)), -1 if whole else -np.inf, np.int64 if whole else np.float64
    )
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = flat
    return matrix


def _falling(
    given_ids: list[Sequence[int]], given_logprobs: list[Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Entries [n, k] in falling order of probability, equal ones by id.

    Values below _LEAST become -inf (no entry).
    """
    ids, logprobs = _matrix(given_ids, whole=True), _matrix(given_logprobs, whole=False)
    logprobs[logprobs < _LEAST] = -np.inf
    order = np.lexsort((ids, -logprobs), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


def _check_entries(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> None:
    """Raises BadRowError unless every row [n, k] is part of a distribution over the model's ids.

    An item with log-probability -inf is not an entry.
    """
    entry = logprobs > -np.inf
    # Items that are no entries get different negative ids, so that they are never found as repeated ids.
    known = np.sort(np.where(entry, ids, -1 - np.arange(ids.shape[1])), 1)
    for what, bad in (
        ("a log-probability that is NaN", np.isnan(logprobs).any(1)),
        ("a log-probability that is infinite", np.isposinf(logprobs).any(1)),
        ("no entry", ~entry.any(1)),
        (
            f"an id that is not one of the model's {vocab_size}",
            (entry & ((ids < 0) | (ids >= vocab_size))).any(1),
        ),
        ("an id twice", (np.diff(known, axis=1) == 0).any(1)),
        ("more probability than one", ~(np.exp(logprobs).sum(1) <= 1 + _MASS)),
    ):
        if bad.any():
            raise BadRowError(f"response row {bad.argmax()} has {what}")


def _close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether a equals b up to rounding."""
    return np.abs(a - b) <= _ABSOLUTE + _RELATIVE * np.abs(b)


def _own_logprobs(
    ids: np.ndarray, logprobs: np.ndarray, tokens: np.ndarray, given: Sequence[float | None]
) -> np.ndarray:
    """float64 [n]: log p of the text's tokens, as given or from the entries.

    ids, logprobs [n, k]: the entries. tokens [n]: the text's tokens. given: their log p in the file, None if
    it has none.
    Raises BadRowError if a log p is neither given nor among the entries, or if it is NaN, infinite or below
    _LEAST. Also raises BadRowError if the row must be about another token: a token outside the entries is
    likelier than one of them, or a token among the entries has another probability there.
    """
    missing = np.array([value is None for value in given])
    token_logprobs = _matrix([[0.0 if value is None else value for value in given]], whole=False)[0]
    # `named`: the token's id is in the row; `among`: it is an entry,
    # with a probability above 0; `inside`: per row.
    named = ids == tokens[:, None]
    among = named & (logprobs > -np.inf)
    inside = among.any(1)
    impossible = np.where(missing, named.any(1) & ~inside, token_logprobs < _LEAST)
    # The token's log p among the entries must be the given one.
    # Outside, it is at most that of the least entry.
    entry = np.where(among, logprobs, -np.inf).max(1)
    least = np.where(logprobs > -np.inf, logprobs, np.inf).min(1)
    with np.errstate(invalid="ignore"):  # -inf - -inf
        most_outside = least + _ABSOLUTE + _RELATIVE * np.abs(least)
        fits = np.where(inside, _close(token_logprobs, entry), token_logprobs <= most_outside)
    for what, bad in (
        ("has a log-probability that is NaN", np.isnan(token_logprobs)),
        ("has a log-probability that is infinite", np.isposinf(token_logprobs)),
        (
            f"has a log-probability below {_LEAST:g}, which means probability 0. Remove the example, or "
            "capture it with a model that can generate its answer.",
            impossible,
        ),
        ("is not an entry, and token_logprobs does not give its probability either", missing & ~inside),
        (
            "has another probability among the entries, or must be one of them. Check whether the rows are "
            "shifted by one token.",
            ~missing & ~fits,
        ),
        (
            "is not an entry, but its probability and those of the entries add up to more than one. Check "
            "whether the rows are shifted by one token.",
            ~missing & ~inside & (np.exp(logprobs).sum(1) + np.exp(token_logprobs) > 1 + _MASS),
        ),
    ):
        if bad.any():
            row = bad.argmax()
            raise BadRowError(f"response row {row}: token {tokens[row]} {what}")
    return np.where(missing, entry, token_logprobs)


def _sums_of_entries(
    ids: np.ndarray,
    logprobs: np.ndarray,
    tokens: np.ndarray,
    token_logprobs: np.ndarray,
    temperatures: Sequence[float],
) -> dict[float, list[float | None]]:
    """The log-sum-exp [n] by temperature over the entries and the text's token, relative to the largest.

    ids, logprobs [n, k]: the entries. tokens, token_logprobs [n]: of the text.
    """
    largest = logprobs[:, 0]
    outside = ~((ids == tokens[:, None]) & (logprobs > -np.inf)).any(1)
    sums: dict[float, list[float | None]] = {1.0: (-largest).tolist()}
    for temperature in temperatures:
        if temperature != 1.0:
            own = np.exp((token_logprobs - largest) / temperature) * outside
            total = np.exp((logprobs - largest[:, None]) / temperature).sum(1) + own
            sums[temperature] = np.log(total).tolist()
    return sums


def _logsumexps(
    logprobs: np.ndarray, given: Mapping[float, Sequence[float | None]], temperatures: Sequence[float]
) -> np.ndarray:
    """float32 [n, 1 + t]: log-sum-exp relative to the largest logit, at T = 1 and at every temperature.

    logprobs [n, k]: falling log p at T = 1. The log-sum-exp at T = 1 is minus the largest of them. For other
    temperatures the file must give it.
    Raises BadRowError if the file lacks a temperature, or if its values are impossible.
    """
    relative = logprobs - logprobs[:, :1]
    # Rounded probabilities may add up to slightly more than one. Then the entries are the whole distribution:
    # the maximum keeps the tail from becoming negative.
    columns = [np.maximum(-logprobs[:, 0], np.log(np.exp(relative).sum(1)))]
    for temperature in temperatures:
        if temperature == 1.0:
            columns.append(columns[0])
            continue
        if not {1.0, temperature} <= given.keys():
            raise BadRowError(
                f"logsumexp is not given at temperature {temperature:g}, or not at temperature 1 (which is "
                "needed for comparison). The mass outside the entries cannot be computed from "
                f'log-probabilities at temperature 1. Add the column logsumexp to the file: {{"1": [...], '
                f'"{temperature:g}": [...]}} (docs/captures.md). Or set loss.teacher_temperature to 1, and '
                "capture.temperatures too if the recipe has it."
            )
        at_one, lse = (_matrix([given[t]], whole=False)[0] for t in (1.0, temperature))
        for what, bad in (
            ("is not finite", ~np.isfinite(lse)),
            (
                "is not relative to the largest logit: its value at temperature 1 is not minus the largest "
                "log-probability",
                ~_close(at_one, columns[0]),
            ),
            (
                "is smaller than that of the entries alone",
                ~(np.exp(relative / temperature).sum(1) <= np.exp(lse) * (1 + _MASS)),
            ),
        ):
            if bad.any():
                raise BadRowError(f"logsumexp {what} (response row {bad.argmax()})")
        columns.append(np.maximum(lse, np.log(np.exp(relative / temperature).sum(1))))
    return np.stack(columns, 1).astype(np.float32)
