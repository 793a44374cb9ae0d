"""Sparse distributions, row after row, and their entries as flat arrays.

Legend: r source rows, m target rows, e entries of all rows.
"""

from dataclasses import dataclass

import numpy as np

from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.spans import TokenSpans


@dataclass(frozen=True, eq=False)
class Entries:
    """rows int64 [e]: the target row that each belongs to, not decreasing; ids int32 [e]; logprobs float64 [e]."""

    rows: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Entries":
        return Entries(self.rows[chosen], self.ids[chosen], self.logprobs[chosen])


@dataclass(frozen=True, eq=False)
class Rows:
    """Ragged sparse distributions: counts uint8 [r]; ids int32 [e]; logprobs float32 [e], natural, at the KL
    temperature; e = counts.sum(), row after row. The tail, 1 - the stored mass, is never stored."""

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    def __post_init__(self) -> None:
        total = int(self.counts.sum(dtype=np.int64))
        if not total == len(self.ids) == len(self.logprobs):
            raise ValueError(f"counts add up to {total}, but {len(self.ids)} ids, {len(self.logprobs)} logprobs")
        if np.isnan(self.logprobs).any():
            raise ValueError("a log-probability is NaN")

    def kept(self) -> np.ndarray:
        """float64 [r]: stored mass of every row."""
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        return np.bincount(rows, np.exp(self.logprobs.astype(np.float64)), minlength=len(self.counts))

    def below(self, vocab_size: int) -> "Rows":
        """Without entries of padded logits columns, which no tokenizer knows: their mass joins the tail."""
        known = self.ids < vocab_size
        if known.all():
            return self
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        counts = np.bincount(rows[known], minlength=len(self.counts)).astype(np.uint8)
        return Rows(counts, self.ids[known], self.logprobs[known])

    def taken(self, row: np.ndarray) -> Entries:
        """The entries of row[i] as those of row i, i < m; -1 takes none."""
        places = np.flatnonzero(row >= 0)
        chosen = row[places]
        sizes = self.counts[chosen].astype(np.int64)
        before = np.cumsum(self.counts, dtype=np.int64)[chosen] - np.cumsum(sizes)  # offset there less offset here
        entries = np.repeat(before, sizes) + np.arange(sizes.sum())
        return Entries(np.repeat(places, sizes), self.ids[entries], self.logprobs[entries].astype(np.float64))


@dataclass(frozen=True, eq=False)
class SourceRows:
    """What a capture knows of one source at the rows of its responses; r rows.

    spans: the tokens that came; rows: the distributions at `temperature`; token_logprobs float [r]: log p_1 of the
    token that came; logsumexp, logsumexp_temperature float [r]: at T=1 and at `temperature`, relative to the row's
    largest logit.
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
                raise ValueError(f"{len(self.spans)} spans, but {length} {name}")

    def tempered_token_logprobs(self, row: np.ndarray) -> np.ndarray:
        """float64: log p_T of the tokens that came at these rows, stored or not."""
        logits = self.token_logprobs[row].astype(np.float64) + self.logsumexp[row]
        return logits / self.temperature - self.logsumexp_temperature[row]

    def untempered(self, logprobs: np.ndarray, row: np.ndarray) -> np.ndarray:
        """log p_1 of entries whose log p_T at these rows is given."""
        return self.temperature * (logprobs + self.logsumexp_temperature[row]) - self.logsumexp[row]


def merge_entries(entries: Entries, count: int) -> Rows:
    """`count` rows: entries of equal row and id added up in fp64, without id -1 and without entries of no mass.

    Entries of a row stand by falling log-probability, equal ones in the order in which they came: a row in which
    nothing meets and nothing is out of order comes back bit for bit, whatever the ids are called.
    """
    some = (entries.ids >= 0) & (entries.logprobs > -np.inf)
    entries = _fall(_add_up(entries if some.all() else entries[some]))
    counts = np.bincount(entries.rows, minlength=count)
    if counts.max(initial=0) > 255:
        raise ValueError(f"a row has {counts.max()} entries, more than 255")
    return Rows(counts.astype(np.uint8), entries.ids.astype(np.int32), entries.logprobs.astype(np.float32))


def _add_up(entries: Entries) -> Entries:
    """Entries that meet become one, in the place of the first of them."""
    key = entries.rows * (int(entries.ids.max(initial=0)) + 1) + entries.ids
    order = np.argsort(key, kind="stable")
    key = key[order]
    again = np.flatnonzero(key[1:] == key[:-1]) + 1  # in this order, equal to the one before
    if not len(again):
        return entries
    first = np.searchsorted(key, key[again])
    logprobs, keep = entries.logprobs.copy(), np.ones(len(key), bool)
    np.logaddexp.at(logprobs, order[first], logprobs[order[again]])
    keep[order[again]] = False
    return Entries(entries.rows, entries.ids, logprobs)[keep]


def _fall(entries: Entries) -> Entries:
    """Sorts the rows that are out of order; few are, since captured rows fall."""
    rises = np.flatnonzero((entries.logprobs[1:] > entries.logprobs[:-1]) & (entries.rows[1:] == entries.rows[:-1]))
    if not len(rises):
        return entries
    disordered = np.zeros(entries.rows[-1] + 1, bool)
    disordered[entries.rows[rises]] = True
    places = np.flatnonzero(disordered[entries.rows])
    order = np.arange(len(entries.rows))
    order[places] = places[np.lexsort((-entries.logprobs[places], entries.rows[places]))]
    return entries[order]
