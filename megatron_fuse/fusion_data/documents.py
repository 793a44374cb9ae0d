"""One conversation with the rows of its teacher, as views of memory-mapped files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY
from megatron_fuse.fusion_data.streams import Stream

TEXT_FIELDS = ("tokens", "supervised")
ROW_FIELDS = ("counts", "entry_ids", "entry_logprobs", "match")  # names of files


@dataclass(frozen=True, eq=False)
class Document:
    """One conversation. r = supervised.sum(); row i is the distribution that PREDICTS the i-th supervised
    token.

    tokens [n] uint16 or int32, depending on the size of the vocabulary.
    supervised bool [n]: the token is a label.
    counts uint8 [r]: number of stored entries of a row; 0 if the teacher has no row there.
    teacher_ids [e], dtype of tokens, and teacher_logprobs float16 [e]: natural log at the KL temperature; e =
    counts.sum(). Their files are named entry_ids and entry_logprobs.
    match uint8 [r]: index in MATCHES.

    The tail of a row is the rest of its mass, 1 - sum(exp(teacher_logprobs)). All arrays are read-only views
    in the dtypes on disk: cast them before you calculate.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    counts: np.ndarray
    teacher_ids: np.ndarray
    teacher_logprobs: np.ndarray
    match: np.ndarray


class DocumentStreams:
    """The documents of all examples: the text, with the rows of one source or without rows.

    The document of an example that was left out is empty. lengths, supervised_tokens [examples] int64: number
    of tokens and of labels of each document.
    """

    def __init__(
        self,
        directory: Path,
        text: Mapping[str, Stream],
        rows: Mapping[str, Stream] | None,
        *,
        examples: int,
        entries_per_row: int = 0,
        supervised_tokens: np.ndarray | None = None,
    ) -> None:
        """text: streams of TEXT_FIELDS. rows: streams of ROW_FIELDS, None for no rows. directory: for errors.

        examples: number of examples. entries_per_row: the most entries that a row can have. supervised_tokens
        [examples]: may be left out if there are rows, else ValueError.

        Compares the lengths of the streams, without reading a document. Raises UserError if they contradict
        each other.
        """
        self._directory = directory
        self._tokens, self._supervised = (text[field] for field in TEXT_FIELDS)
        self._rows = None if rows is None else tuple(rows[field] for field in ROW_FIELDS)
        for field, stream in {**text, **(rows or {})}.items():
            if len(stream) != examples:
                raise UserError(
                    f"{directory}: {field} has {len(stream)} examples, but the text has {examples}. "
                    f"{fix(directory)}"
                )
        self.lengths = self._tokens.lengths
        self._refuse(self._supervised.lengths != self.lengths, "one supervision mark per token")
        if self._rows is not None:
            counts, ids, logprobs, match = (stream.lengths for stream in self._rows)
            supervised_tokens = counts if supervised_tokens is None else supervised_tokens
            self._refuse(counts != supervised_tokens, "one row per supervised token")
            self._refuse(match != counts, "one match per row")
            self._refuse(ids > entries_per_row * counts, f"at most {entries_per_row} entries per row")
            self._refuse(logprobs != ids, "one log-probability per entry")
        elif supervised_tokens is None:
            raise ValueError("supervised_tokens may be left out only if there are rows")
        self.supervised_tokens = supervised_tokens

    def _damaged(self, example: int, what: str) -> UserError:
        return UserError(f"{self._directory}: example {example} has {what}. {fix(self._directory)}")

    def _refuse(self, wrong: np.ndarray, rule: str) -> None:
        if wrong.any():
            raise self._damaged(int(wrong.argmax()), f"not {rule}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, example: int) -> Document:
        """The document of an example.

        Raises UserError if the numbers of its labels, rows and entries do not agree.
        """
        tokens = self._tokens[example]
        supervised = self._supervised[example].view(bool)
        labels = int(self.supervised_tokens[example])
        rows = no_rows(labels) if self._rows is None else tuple(stream[example] for stream in self._rows)
        counts, ids, logprobs, match = rows
        if (marked := np.count_nonzero(supervised)) != labels:
            raise self._damaged(example, f"{marked} labels instead of {labels}")
        if np.count_nonzero(supervised[:1]):
            raise self._damaged(example, "a label at its first token, which nothing predicts")
        if (entries := int(counts.sum())) != len(ids):
            raise self._damaged(
                example, f"{len(ids)} entries, but the counts of its rows add up to {entries}"
            )
        return Document(tokens, supervised, counts, ids, logprobs.view(np.float16), match)


def no_rows(labels: int) -> tuple[np.ndarray, ...]:
    """counts, teacher_ids, teacher_logprobs, match for so many labels without teacher: all counts are 0."""
    return (
        np.zeros(labels, np.uint8),
        np.zeros(0, np.uint16),
        np.zeros(0, np.float16),
        np.zeros(labels, np.uint8),
    )


def round_down_to_half(values: np.ndarray) -> np.ndarray:
    """Each value rounded down to float16.

    Values are clipped first: to at most 0, and to the least finite float16.
    """
    values = np.clip(values, np.finfo(np.float16).min, 0)
    half = values.astype(np.float16)
    above = half.astype(values.dtype) > values
    half[above] = np.nextafter(half[above], np.float16(-np.inf))
    return half


NO_DOCUMENT = Document(np.zeros(0, np.uint16), np.zeros(0, bool), *no_rows(0))


def fix(directory: Path) -> str:
    return f"Restore the files, or remove {directory} and run {BUILT_BY} again."
