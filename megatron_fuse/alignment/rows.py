"""Sparse distributions in rows, and their entries as flat arrays.

Legend: r source rows, m target rows, e entries of all rows.
"""

from dataclasses import dataclass

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.spans import TokenSpans


@dataclass(frozen=True, eq=False)
class Entries:
    """rows int64 [e]: the target row of each entry, not decreasing; ids int32 [e]; logprobs float64 [e]."""

    rows: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Entries":
        return Entries(self.rows[chosen], self.ids[chosen], self.logprobs[chosen])


@dataclass(frozen=True, eq=False)
class Rows:
    """Ragged sparse distributions, concatenated row after row.

    counts uint8 [r]: entries per row. ids int32 [e]. logprobs float32 [e]: natural logarithms, at the
    temperature of the KL. e = counts.sum(). The tail, 1 - the stored mass, is never stored.
    """

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    def __post_init__(self) -> None:
        total = int(self.counts.sum(dtype=np.int64))
        if not total == len(self.ids) == len(self.logprobs):
            raise ValueError(
                f"the counts add up to {total}, but there are {len(self.ids)} ids and {len(self.logprobs)} "
                "log-probabilities"
            )
        if np.isnan(self.logprobs).any():
            raise ValueError("a log-probability is NaN")

    def kept(self) -> np.ndarray:
        """float64 [r]: the stored mass of every row."""
        rows = ragged.row_numbers(self.counts)
        return np.bincount(rows, np.exp(self.logprobs.astype(np.float64)), minlength=len(self.counts))

    def below(self, vocab_size: int) -> "Rows":
        """The rows without entries of padded logits columns, which no tokenizer knows.

        The mass of these entries joins the tail.
        """
        known = self.ids < vocab_size
        if known.all():
            return self
        rows = ragged.row_numbers(self.counts)
        counts = np.bincount(rows[known], minlength=len(self.counts)).astype(np.uint8)
        return Rows(counts, self.ids[known], self.logprobs[known])

    def entries_of(self, row: np.ndarray) -> Entries:
        """The entries of m rows: row i gets those of row[i], or none if row[i] is -1. row int [m]."""
        places = np.flatnonzero(row >= 0)
        chosen = row[places]
        sizes = self.counts[chosen].astype(np.int64)
        # `before` is where a row's entries end here minus where they end in the result. Added to the place of
        # an entry in the result, it gives the entry's place here.
        before = np.cumsum(self.counts, dtype=np.int64)[chosen] - np.cumsum(sizes)
        entries = np.repeat(before, sizes) + np.arange(sizes.sum())
        return Entries(np.repeat(places, sizes), self.ids[entries], self.logprobs[entries].astype(np.float64))


@dataclass(frozen=True, eq=False)
class SourceRows:
    """What a capture knows of one source at the r rows of its responses.

    spans: the tokens of the text. rows: the distributions at `temperature`. token_logprobs float [r]: log p_1
    of the text's token. logsumexp, logsumexp_temperature float [r]: at T=1 and at `temperature`, relative to
    the row's largest logit.
    """

    tokenizer: Tokenizer
    spans: TokenSpans
    rows: Rows
    temperature: float
    token_logprobs: np.ndarray
    logsumexp: np.ndarray
    logsumexp_temperature: np.ndarray

    def __post_init__(self) -> None:
        lengths = {
            "rows": len(self.rows.counts),
            "token_logprobs": len(self.token_logprobs),
            "logsumexp": len(self.logsumexp),
            "logsumexp_temperature": len(self.logsumexp_temperature),
        }
        for name, length in lengths.items():
            if length != len(self.spans):
                raise ValueError(f"there are {len(self.spans)} spans, but {length} {name}")

    def tempered_token_logprobs(self, row: np.ndarray) -> np.ndarray:
        """float64: log p_T of the text's tokens at these rows, whether they are stored or not."""
        # log p_1 = z - logsumexp(z) and log p_T = z / T - logsumexp(z / T), with logits z.
        logits = self.token_logprobs[row].astype(np.float64) + self.logsumexp[row]
        return logits / self.temperature - self.logsumexp_temperature[row]

    def untempered(self, logprobs: np.ndarray, row: np.ndarray) -> np.ndarray:
        """log p_1 of entries, of their log p_T at these rows."""
        return self.temperature * (logprobs + self.logsumexp_temperature[row]) - self.logsumexp[row]


def merge_entries(entries: Entries, count: int) -> Rows:
    """Makes `count` rows of the entries. Entries of equal row and id are added up in fp64.

    Entries with id -1 or without mass are left out. The entries of a row are sorted by falling
    log-probability; equal ones keep their order. So a row without equal ids that is already sorted stays the
    same bit for bit, whatever its ids are.
    Raises ValueError if a row has more than 255 entries.
    """
    has_mass = (entries.ids >= 0) & (entries.logprobs > -np.inf)
    entries = _fall(_add_up(entries if has_mass.all() else entries[has_mass]))
    counts = np.bincount(entries.rows, minlength=count)
    if counts.max(initial=0) > 255:
        raise ValueError(f"a row has {counts.max()} entries, more than 255")
    return Rows(counts.astype(np.uint8), entries.ids.astype(np.int32), entries.logprobs.astype(np.float32))


def _add_up(entries: Entries) -> Entries:
    """Entries of equal row and id become one, in the place of the first of them."""
    key = entries.rows * (int(entries.ids.max(initial=0)) + 1) + entries.ids
    order = np.argsort(key, kind="stable")
    key = key[order]
    # The sort is stable, so the first entry of a group of equal keys is also the first in the row.
    again = np.flatnonzero(key[1:] == key[:-1]) + 1  # in this order, equal to the one before
    if not len(again):
        return entries
    first = np.searchsorted(key, key[again])
    logprobs, keep = entries.logprobs.copy(), np.ones(len(key), bool)
    np.logaddexp.at(logprobs, order[first], logprobs[order[again]])
    keep[order[again]] = False
    return Entries(entries.rows, entries.ids, logprobs)[keep]


def _fall(entries: Entries) -> Entries:
    """Sorts the rows that are out of order. They are few: captured rows are sorted already."""
    rises = np.flatnonzero(
        (entries.logprobs[1:] > entries.logprobs[:-1]) & (entries.rows[1:] == entries.rows[:-1])
    )
    if not len(rises):
        return entries
    disordered = np.zeros(entries.rows[-1] + 1, bool)
    disordered[entries.rows[rises]] = True
    places = np.flatnonzero(disordered[entries.rows])
    order = np.arange(len(entries.rows))
    order[places] = places[np.lexsort((-entries.logprobs[places], entries.rows[places]))]
    return entries[order]
