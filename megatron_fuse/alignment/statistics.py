"""Mapping statistics: how often a target token and a source token begin at the same byte of real text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_fuse.alignment.boundaries import find_source_rows
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans

NOT_COUNTED = SpanFlag.LEADING | SpanFlag.STOP


@dataclass(frozen=True, eq=False)
class PairCounts:
    """How often each of n different pairs of tokens occurs.

    source, target int32 [n]: the pairs, sorted by source token, then target token. counts int64 [n], >= 1.
    Memory grows with the number of different pairs (about 100 thousand in a large corpus), not with the
    texts.
    """

    source: np.ndarray
    target: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, source: TokenSpans, target: TokenSpans) -> "PairCounts":
        """The pairs of two tokenizations of the same bytes (`response_bytes`, of one response or of a whole
        shard).

        A pair counts if `find_source_rows` has a source row for a target row and both tokens begin at the
        same byte. Two kinds of tokens are not counted: stop tokens, because they are paired by role, and
        tokens that begin in a template's white space, because a map has separate tables for them.
        """
        row, inside = find_source_rows(source, target)
        counted = (row >= 0) & ~inside & ~target.has(NOT_COUNTED)
        counted[counted] = ~source.has(NOT_COUNTED)[row[counted]]
        pairs = source.tokens[row[counted]].astype(np.int64) << 32 | target.tokens[counted].astype(np.int64)
        return cls._unpack(*np.unique(pairs, return_counts=True))

    def __add__(self, other: "PairCounts") -> "PairCounts":
        """The counts of both texts."""
        pairs, place = np.unique(np.concatenate([self._packed(), other._packed()]), return_inverse=True)
        counts = np.zeros(len(pairs), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([self.counts, other.counts]))
        return self._unpack(pairs, counts)

    def most_frequent(self, otherwise: np.ndarray) -> np.ndarray:
        """Per source token the target token most often met with it: int32 [Vs].

        otherwise int32 [Vs]: the choice if the source token occurs in no pair, or equally often with several
        tokens.
        """
        chosen = otherwise.astype(np.int32)
        tokens, begins = np.unique(self.source, return_index=True)
        if not len(tokens):
            return chosen
        group = np.repeat(np.arange(len(tokens)), np.diff(begins, append=len(self.source)))
        # `alone` drops source tokens whose highest count belongs to more than one target token.
        most = self.counts == np.maximum.reduceat(self.counts, begins)[group]
        alone = most & (np.add.reduceat(most.astype(np.int64), begins)[group] == 1)
        chosen[self.source[alone]] = self.target[alone]
        return chosen

    def _packed(self) -> np.ndarray:
        return self.source.astype(np.int64) << 32 | self.target.astype(np.int64)

    @classmethod
    def _unpack(cls, pairs: np.ndarray, counts: np.ndarray) -> "PairCounts":
        return cls(
            (pairs >> 32).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32), counts.astype(np.int64)
        )


def count_pairs(shards: Iterable[tuple[TokenSpans, TokenSpans]]) -> PairCounts:
    """The pairs of all shards. shards gives (source, target) of each; one shard is in memory at a time."""
    nothing = np.zeros(0, dtype=np.int32)
    total = PairCounts(nothing, nothing, nothing.astype(np.int64))
    for source, target in shards:
        total += PairCounts.of(source, target)
    return total
