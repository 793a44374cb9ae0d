"""The rules that one shard of documents and its teacher's rows must obey, checked as whole arrays.

For each kind of error in a file, the first one is described and the others are counted. n examples, r rows, e
entries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.alignment import MATCHES
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY
from megatron_fuse.fusion_data.listing import read_listed as read_listed_examples
from megatron_fuse.fusion_data.stored_spans import read_spans
from megatron_fuse.fusion_data.streams import Stream

# Log-probabilities are rounded down to float16. So only the float32 rounding of a row can bring its mass
# above 1.
MOST_MASS = 1 + 1e-4

Problems = Iterator[str]


@dataclass(frozen=True, eq=False)
class Field:
    """One field of a shard. values: of all examples, concatenated.

    lengths int64 [n]: number of values of each example.
    """

    values: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardFiles:
    """The readable fields of a shard with as many examples as `names`; the problems of the others."""

    prefix: Path
    names: Sequence[str]
    fields: dict[str, Field]
    problems: list[str]

    @classmethod
    def read(cls, prefix: Path, names: Sequence[str], fields: Sequence[str]) -> "ShardFiles":
        readable, problems = {}, []
        for field in fields:
            try:
                stream = Stream([f"{prefix}.{field}"])
            except UserError as error:
                problems.append(str(error))
                continue
            if len(stream) != len(names):
                problems.append(
                    f"{prefix}.{field}.idx: {len(stream)} examples, but the text has "
                    f"{len(names)}{fix(prefix)}"
                )
            else:
                readable[field] = Field(stream.values(), stream.lengths)
        return cls(prefix, names, readable, problems)

    def wrong(
        self, field: str, bad: np.ndarray, place: Callable[[int], str], say: Callable[[int], str]
    ) -> Problems:
        """At most one line, for the first index that is bad [m].

        place(index), say(index): where it is and what is wrong.
        """
        numbers = np.flatnonzero(bad)
        if len(numbers):
            more = f" (and {len(numbers) - 1:,} more in this file)" if len(numbers) > 1 else ""
            yield f"{self.prefix}.{field}.bin: {place(numbers[0])}: {say(numbers[0])}{more}{fix(self.prefix)}"

    def example(self, number: int) -> str:
        return f"example {self.names[number]!r}"

    def place(self, lengths: np.ndarray, what: str) -> Callable[[int], str]:
        """A function of the index of a value: names its example and its place there.

        lengths int64 [n]: values per example.
        """
        ends = np.cumsum(lengths)

        def describe(number: int) -> str:
            example = int(np.searchsorted(ends, number, side="right"))
            return f"{self.example(example)}, {what} {number - int(ends[example] - lengths[example])}"

        return describe


def fix(path: Path) -> str:
    """The end of a problem's line: what the user must do if a file, or the files of a prefix, are damaged."""
    return f". Restore the file, or remove {path.parent} and run {BUILT_BY} again."


def read_listed(prefix: Path) -> dict[str, int]:
    """Example id -> number of supervised tokens, as the text lists them.

    Raises UserError if the list cannot be read.
    """
    path = prefix.with_name(prefix.name + ".examples.jsonl")
    try:
        return {row.id: row.supervised_tokens for row in read_listed_examples(path)}
    except (UserError, OSError) as error:
        raise UserError(
            f"{path}: the examples cannot be read ({str(error).removesuffix('.')}){fix(prefix)}"
        ) from error


def document_problems(shard: ShardFiles, *, vocab_size: int, seq_length: int) -> Problems:
    """Problems of the fields tokens and supervised.

    Ids must lie within the vocabulary. Each token must have a mark of 0 or 1, the first token 0. A document
    must have at most seq_length + 1 tokens.
    """
    yield from shard.problems
    tokens, marks = shard.fields.get("tokens"), shard.fields.get("supervised")
    if tokens is not None:
        place = shard.place(tokens.lengths, "token")
        yield from _unknown_ids(shard, "tokens", tokens.values, vocab_size, place)
        limit = seq_length + 1  # the last token is only predicted, and never read
        yield from shard.wrong(
            "tokens",
            tokens.lengths > limit,
            shard.example,
            lambda i: f"{tokens.lengths[i]} tokens, but seq_length {seq_length} allows {limit}",
        )
    if marks is not None:
        place = shard.place(marks.lengths, "token")
        yield from shard.wrong(
            "supervised", marks.values > 1, place, lambda i: f"the mark is {marks.values[i]}, not 0 or 1"
        )
        first = ragged.offsets(marks.lengths)[:-1]
        present = np.flatnonzero(marks.lengths)
        labelled = np.zeros(len(marks.lengths), bool)
        labelled[present] = marks.values[first[present]] != 0
        yield from shard.wrong(
            "supervised",
            labelled,
            shard.example,
            lambda i: "its first token is a label, which nothing predicts",
        )
    if tokens is not None and marks is not None:
        yield from shard.wrong(
            "supervised",
            tokens.lengths != marks.lengths,
            shard.example,
            lambda i: f"{marks.lengths[i]} marks for {tokens.lengths[i]} tokens",
        )


def labels_per_example(shard: ShardFiles) -> np.ndarray | None:
    """int64 [n]: number of supervised tokens of every document; None if they cannot be read."""
    marks = shard.fields.get("supervised")
    if marks is None:
        return None
    example = ragged.row_numbers(marks.lengths)
    return np.bincount(example, marks.values != 0, len(marks.lengths)).astype(np.int64)


def listed_problems(shard: ShardFiles, labels: np.ndarray | None, listed: np.ndarray) -> Problems:
    """Problems of the text: labels [n], counted from its marks, against those in its list of examples."""
    if labels is not None:
        yield from shard.wrong(
            "supervised",
            labels != listed,
            shard.example,
            lambda i: f"{labels[i]} labels, but {listed[i]} are listed",
        )


def span_problems(path: Path, labels: np.ndarray, names: list[str]) -> Problems:
    """Problems of the text's spans. labels int64 [n]: supervised tokens of every example.

    names [n]: their ids.
    """
    try:
        arrays = read_spans(path, labels=int(labels.sum()), examples=len(labels))
    except UserError as error:
        yield str(error)
        return
    starts, ends = arrays["starts"], arrays["ends"]
    example = ragged.row_numbers(labels)
    falls = np.concatenate([[False], (np.diff(starts) < 0) & (np.diff(example) == 0)])[: len(starts)]
    wrong = (ends < starts) | (starts < 0) | falls
    if wrong.any():
        row = int(wrong.argmax())
        yield (
            f"{path}: example {names[example[row]]!r}: a label covers bytes {starts[row]} to {ends[row]}, "
            f"which are not a range after the previous label{fix(path)}"
        )


def row_problems(
    shard: ShardFiles, labels: np.ndarray | None, *, vocab_size: int, entries_per_row: int
) -> Problems:
    """Problems of the fields of rows.

    labels int64 [n]: supervised tokens of the rows' documents; None if unknown.
    """
    yield from shard.problems
    counts, match, ids, logprobs = map(shard.fields.get, ("counts", "match", "entry_ids", "entry_logprobs"))
    if counts is not None and labels is not None:
        yield from shard.wrong(
            "counts",
            counts.lengths != labels,
            shard.example,
            lambda i: f"{counts.lengths[i]} rows for {labels[i]} supervised tokens",
        )
    if counts is not None:
        yield from shard.wrong(
            "counts",
            counts.values > entries_per_row,
            shard.place(counts.lengths, "row"),
            lambda i: f"{counts.values[i]} entries, but at most {entries_per_row} are possible",
        )
    if match is not None:
        yield from _match_problems(shard, match, counts)
    fits = True
    for field, entries in (("entry_ids", ids), ("entry_logprobs", logprobs)):
        if entries is None or counts is None:
            fits = False
            continue
        example = ragged.row_numbers(counts.lengths)
        expected = np.bincount(example, counts.values, len(counts.lengths)).astype(np.int64)
        differs = entries.lengths != expected
        fits = fits and not differs.any()
        yield from shard.wrong(
            field,
            differs,
            shard.example,
            partial(_said_entries, entries.lengths, expected),
        )
    if ids is not None:
        yield from _unknown_ids(shard, "entry_ids", ids.values, vocab_size, shard.place(ids.lengths, "entry"))
    if logprobs is not None:
        values = logprobs.values.view(np.float16)
        yield from shard.wrong(
            "entry_logprobs",
            ~np.isfinite(values) | (values > 0),
            shard.place(logprobs.lengths, "entry"),
            lambda i: f"the log-probability is {values[i]}, not a finite number of at most 0",
        )
    if fits and counts is not None and ids is not None and logprobs is not None:
        yield from _whole_row_problems(shard, counts, ids.values, logprobs.values.view(np.float16))


def _said_entries(have: np.ndarray, want: np.ndarray, number: int) -> str:
    return f"{have[number]} entries, but the counts add up to {want[number]}"


def _unknown_ids(
    shard: ShardFiles, field: str, ids: np.ndarray, vocab_size: int, place: Callable[[int], str]
) -> Problems:
    yield from shard.wrong(
        field,
        (ids < 0) | (ids >= vocab_size),
        place,
        lambda i: f"id {ids[i]}, but the target's vocabulary has {vocab_size} ids",
    )


def _match_problems(shard: ShardFiles, match: Field, counts: Field | None) -> Problems:
    place = shard.place(match.lengths, "row")
    yield from shard.wrong(
        "match",
        match.values >= len(MATCHES),
        place,
        lambda i: f"code {match.values[i]}, but the known codes are 0 to {len(MATCHES) - 1}",
    )
    if counts is None:
        return
    differs = match.lengths != counts.lengths
    yield from shard.wrong(
        "match", differs, shard.example, lambda i: f"{match.lengths[i]} codes for {counts.lengths[i]} rows"
    )
    if not differs.any():
        skipped = match.values == MATCHES.index("skip")
        yield from shard.wrong(
            "match",
            skipped != (counts.values == 0),
            place,
            lambda i: f"{counts.values[i]} entries in a row that is {'' if skipped[i] else 'not '}skipped",
        )


def _whole_row_problems(shard: ShardFiles, counts: Field, ids: np.ndarray, logprobs: np.ndarray) -> Problems:
    """Problems of rows whose counts fit their entries: a mass above 1, or an id twice in a row."""
    place = shard.place(counts.lengths, "row")
    row = ragged.row_numbers(counts.values)
    with np.errstate(over="ignore", invalid="ignore"):  # row_problems reports impossible log-probabilities
        mass = np.bincount(row, np.exp(logprobs.astype(np.float64)), len(counts.values))
    possible = np.isfinite(mass) & (np.bincount(row, logprobs > 0, len(counts.values)) == 0)
    yield from shard.wrong(
        "entry_logprobs",
        possible & (mass > MOST_MASS),
        place,
        lambda i: f"the mass is {mass[i]:.6f}, more than 1",
    )
    key = np.sort(row.astype(np.int64) << 32 | (ids.astype(np.int64) & 0xFFFFFFFF))
    twice = key[1:][np.diff(key) == 0]
    repeated = np.zeros(len(counts.values), np.int64)
    repeated[twice >> 32] = 1 + (twice & 0xFFFFFFFF)
    yield from shard.wrong(
        "entry_ids", repeated > 0, place, lambda i: f"id {repeated[i] - 1} is twice in the row"
    )
