"""Strings at an edit distance of 0 to 3, found by equal patterns instead of pair by pair.

Edits turn one string into another: they delete, insert and replace characters. Remove the deleted characters
from the first string and the inserted ones from the second, and put a wildcard for each replaced character:
both strings are now the same pattern. So two strings are at distance <= d if they share a pattern of d edits
(a deletion neighbourhood, as in FastSS and SymSpell, with wildcards). Sorting finds the strings that share a
pattern. A pattern is stored as a hash of 64 bits. Two different patterns may have the same hash: the caller
must check this.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb

import numpy as np

LONGEST = (1000, 1000, 40, 16)
"""The most characters of a string that is looked up at distance 0, 1, 2, 3.

A string has about length ** distance patterns."""
NO_RANK = np.int64(2**31 - 1)
# Keys of one look-up: 16 MB. Keys of one step over the vocabulary: as many as a CPU cache holds.
_QUERY_KEYS, _BLOCK_KEYS = 1 << 21, 1 << 16
_RANK_BITS = 31
# The base of the hash must be odd, so that no power of it is 0 modulo 2^64; the wildcard may be any number.
_BASE, _WILDCARD = np.uint64(0xD6E8FEB86659FD93), np.uint64(0x9E3779B97F4A7C15)


def code_points(texts: Sequence[str], length: int) -> np.ndarray:
    """uint32 [n, length] of n texts of this length. A lone surrogate counts as a code point too."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).reshape(
        len(texts), length
    )


@dataclass(frozen=True)
class Neighbours:
    """Per query the ranks of all strings of the vocabulary that share a pattern with it.

    The strings that share one pattern are a group.

    queries, groups int64 [h]: the query and one of its groups. places int64 [p], ascending: group << 31 |
    rank of each member.
    """

    queries: np.ndarray
    groups: np.ndarray
    places: np.ndarray

    def first_from(self, ranks: np.ndarray) -> np.ndarray:
        """Per query the first of its ranks that is at least `ranks` [n], or NO_RANK: int64 [n]."""
        best = np.full(len(ranks), NO_RANK)
        at = np.searchsorted(self.places, self._places(ranks))
        known = np.flatnonzero(at < len(self.places))
        self._keep(np.minimum, best, known, at[known])
        return best

    def last_before(self, ranks: np.ndarray) -> np.ndarray:
        """Per query the last of its ranks that is less than `ranks` [n], or -1: int64 [n]."""
        best = np.full(len(ranks), np.int64(-1))
        at = np.searchsorted(self.places, self._places(ranks)) - 1
        known = np.flatnonzero(at >= 0)
        self._keep(np.maximum, best, known, at[known])
        return best

    def _places(self, ranks: np.ndarray) -> np.ndarray:
        return self.groups << _RANK_BITS | ranks[self.queries]

    def _keep(self, extreme: np.ufunc, best: np.ndarray, known: np.ndarray, at: np.ndarray) -> None:
        place = self.places[at]
        inside = place >> _RANK_BITS == self.groups[known]
        extreme.at(best, self.queries[known[inside]], place[inside] & NO_RANK)


class PatternIndex:
    """A vocabulary, ready for look-ups. ranked: its strings; the place in the list is a string's rank."""

    def __init__(self, ranked: Sequence[str]) -> None:
        lengths = np.fromiter(map(len, ranked), np.int64, len(ranked))
        # Length -> ranks, ascending, and prefix hashes.
        self._buckets: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for length in np.unique(lengths).tolist():
            ranks = np.flatnonzero(lengths == length)
            self._buckets[length] = (
                ranks,
                _prefix_hashes(code_points([ranked[rank] for rank in ranks.tolist()], length)),
            )

    def neighbours(self, texts: Sequence[str], length: int, distance: int) -> Neighbours:
        """The neighbours of texts of this length: all strings at most `distance` edits away.

        Rarely a string that is farther away is among them, if two patterns have the same hash.
        """
        prefixes = _prefix_hashes(code_points(texts, length))
        queries, groups, places, known = [], [], [], 0
        for deleted, inserted, replaced in _edits(distance):
            bucket = self._buckets.get(length - deleted + inserted)
            if bucket is None or deleted + replaced > length:
                continue
            # Groups are numbered over all kinds of edits: `known` groups come from the kinds before this one.
            keys = np.concatenate(list(_patterns(prefixes, deleted, replaced)))  # [patterns, n]
            unique, group = np.unique(keys, return_inverse=True)
            members = _members(unique, *bucket, inserted, replaced)
            # Only groups with a member of the vocabulary are stored.
            met = np.zeros(len(unique), bool)
            met[members >> _RANK_BITS] = True
            pattern, query = np.nonzero(met[group.reshape(keys.shape)])
            queries.append(query)
            groups.append(known + group.reshape(keys.shape)[pattern, query])
            places.append((known << _RANK_BITS) + members)
            known += len(unique)
        if not known:
            return Neighbours(*np.zeros((3, 0), np.int64))
        return Neighbours(np.concatenate(queries), np.concatenate(groups), np.concatenate(places))


def queries_at_once(length: int, distance: int) -> int:
    """How many texts of this length one look-up can take without much memory."""
    edits = [(deleted + replaced, replaced) for deleted, _, replaced in _edits(distance)]
    return max(
        _QUERY_KEYS // max(comb(length, places) * comb(places, replaced) for places, replaced in edits), 1
    )


def _edits(distance: int) -> Iterator[tuple[int, int, int]]:
    """All (deleted, inserted, replaced) with this sum."""
    for deleted in range(distance + 1):
        for inserted in range(distance + 1 - deleted):
            yield deleted, inserted, distance - deleted - inserted


def _members(
    keys: np.ndarray, ranks: np.ndarray, prefixes: np.ndarray, inserted: int, replaced: int
) -> np.ndarray:
    """The strings of one length that have one of these patterns: int64, place in `keys` << 31 | rank,
    ascending.

    keys uint64, ascending. ranks [n] and prefixes [length + 1, n]: of the strings.
    """
    # `begins` marks the first bits of the keys. Most patterns of the vocabulary are not marked, which saves
    # the binary search below for them.
    bits = np.uint64(64 - max(len(keys) - 1, 1).bit_length() - 4)
    begins = np.zeros(1 << int(64 - bits), bool)
    begins[keys >> bits] = True
    members = []
    for begin in range(0, len(ranks), _BLOCK_KEYS):
        block = ranks[begin : begin + _BLOCK_KEYS]
        for patterns in _patterns(prefixes[:, begin : begin + _BLOCK_KEYS], inserted, replaced):
            pattern, string = np.nonzero(begins[patterns >> bits])
            likely = patterns[pattern, string]
            place = np.minimum(np.searchsorted(keys, likely), len(keys) - 1)
            equal = keys[place] == likely
            members.append(place[equal] << _RANK_BITS | block[string[equal]])
    return np.sort(np.concatenate(members))


def _prefix_hashes(codes: np.ndarray) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of the first 0, 1, 2 ... characters: uint64 [length + 1, n] of codes
    [n, length].
    """
    hashes = np.zeros((codes.shape[1] + 1, codes.shape[0]), np.uint64)
    for length, column in enumerate(codes.T):
        hashes[length + 1] = hashes[length] * _BASE + _mixed(column)
    return hashes


def _mixed(codes: np.ndarray) -> np.ndarray:
    """SplitMix64: it puts neighbouring code points far from each other."""
    mixed = codes.astype(np.uint64) * _WILDCARD
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def _patterns(prefixes: np.ndarray, left_out: int, wild: int) -> Iterator[np.ndarray]:
    """Hashes of the patterns of n strings, in blocks: uint64 [c, n] of prefix hashes [length + 1, n].

    left_out, wild: how many characters a pattern leaves out, and how many it replaces by a wildcard.
    """
    length, count = prefixes.shape[0] - 1, prefixes.shape[1]
    places, wildcard = _places(length, left_out, wild)
    powers = np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(length, _BASE)]))
    step = max(_BLOCK_KEYS // count, 1)
    for begin in range(0, len(places), step):
        edits = range(left_out + wild)
        hashes, behind = np.zeros(1, np.uint64), np.zeros(len(places[begin : begin + step]), np.int64)
        # h(a + b) = h(a) * base ** len(b) + h(b). So the characters between two
        # edits are added as a whole, by the difference of two prefix hashes, and
        # each wildcard as one character. `behind` is the end of the last edit.
        for edit in edits:
            at, kept = places[begin : begin + step, edit], wildcard[begin : begin + step, edit]
            hashes = (hashes - prefixes[behind]) * powers[at - behind, None] + prefixes[at]
            hashes = (
                hashes * np.where(kept, _BASE, np.uint64(1))[:, None]
                + np.where(kept, _WILDCARD, np.uint64(0))[:, None]
            )
            behind = at + 1
        yield (hashes - prefixes[behind]) * powers[length - behind, None] + prefixes[[length]]


@cache
def _places(length: int, left_out: int, wild: int) -> tuple[np.ndarray, np.ndarray]:
    """All ways to place the edits in a string of this length.

    Returns the places int64 [c, edits], ascending in each row, and bool [c, edits]: whether the edit is a
    wildcard.
    """
    edits = left_out + wild
    places = list(combinations(range(length), edits))
    wildcards = [[edit in chosen for edit in range(edits)] for chosen in combinations(range(edits), wild)]
    return (
        np.repeat(np.array(places, np.int64).reshape(len(places), edits), len(wildcards), axis=0),
        np.tile(np.array(wildcards, bool).reshape(len(wildcards), edits), (len(places), 1)),
    )
