"""Strings at an edit distance of 0 to 3, found by equal patterns instead of pair by pair.

Edits that turn one string into another delete some of its characters, insert some of the other's and replace the rest.
Leave out what is deleted in the one and what is inserted in the other, put a wildcard for what is replaced: both have
become one pattern. So two strings are at distance <= d if they share a pattern of d edits (a deletion neighbourhood, as in
FastSS and SymSpell, with wildcards), and strings that share one are found by sorting. A pattern is kept as a hash of 64
bits: two that differ may share it, which the caller has to check.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb

import numpy as np

LONGEST = (1000, 1000, 40, 16)
"""How many characters a string may have that is looked up at distance 0, 1, 2, 3: its patterns grow by length ** distance."""
NO_RANK = np.int64(2**31 - 1)
_QUERY_KEYS, _BLOCK_KEYS = (
    1 << 21,
    1 << 16,
)  # of one look-up: 16 MB; of one step over the vocabulary: what a cache holds
_RANK_BITS = 31
_BASE, _WILDCARD = np.uint64(0xD6E8FEB86659FD93), np.uint64(0x9E3779B97F4A7C15)  # odd; any


def code_points(texts: Sequence[str], length: int) -> np.ndarray:
    """uint32 [n, length] of n texts of this length; lone surrogates are such points too."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).reshape(len(texts), length)


@dataclass(frozen=True)
class Neighbours:
    """Per query, the ranks of all strings of the vocabulary that share a pattern with it, as the groups that share one.

    queries, groups int64 [h]: the query and one of its groups; places int64 [p], ascending: group and rank of each member.
    """

    queries: np.ndarray
    groups: np.ndarray
    places: np.ndarray

    def first_from(self, ranks: np.ndarray) -> np.ndarray:
        """Per query the first of its ranks that is at least `ranks` [n], or NO_RANK: int64 [n]."""
        found = np.full(len(ranks), NO_RANK)
        at = np.searchsorted(self.places, self._places(ranks))
        known = np.flatnonzero(at < len(self.places))
        self._keep(np.minimum, found, known, at[known])
        return found

    def last_before(self, ranks: np.ndarray) -> np.ndarray:
        """Per query the last of its ranks that is less than `ranks` [n], or -1: int64 [n]."""
        found = np.full(len(ranks), np.int64(-1))
        at = np.searchsorted(self.places, self._places(ranks)) - 1
        known = np.flatnonzero(at >= 0)
        self._keep(np.maximum, found, known, at[known])
        return found

    def _places(self, ranks: np.ndarray) -> np.ndarray:
        return self.groups << _RANK_BITS | ranks[self.queries]

    def _keep(self, extreme: np.ufunc, found: np.ndarray, known: np.ndarray, at: np.ndarray) -> None:
        place = self.places[at]
        inside = place >> _RANK_BITS == self.groups[known]
        extreme.at(found, self.queries[known[inside]], place[inside] & NO_RANK)


class PatternIndex:
    """A vocabulary, ready for look-ups. ranked: its strings; the place in the list is a string's rank."""

    def __init__(self, ranked: Sequence[str]) -> None:
        lengths = np.fromiter(map(len, ranked), np.int64, len(ranked))
        self._buckets: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # length -> ranks, ascending, and prefix hashes
        for length in np.unique(lengths).tolist():
            ranks = np.flatnonzero(lengths == length)
            self._buckets[length] = (
                ranks,
                _prefix_hashes(code_points([ranked[rank] for rank in ranks.tolist()], length)),
            )

    def neighbours(self, texts: Sequence[str], length: int, distance: int) -> Neighbours:
        """Of texts of this length, with all that is at most `distance` edits away, and rarely something else."""
        prefixes = _prefix_hashes(code_points(texts, length))
        queries, groups, places, known = [], [], [], 0
        for deleted, inserted, replaced in _edits(distance):
            bucket = self._buckets.get(length - deleted + inserted)
            if bucket is None or deleted + replaced > length:
                continue
            keys = np.concatenate(list(_patterns(prefixes, deleted, replaced)))  # [patterns, n]
            unique, group = np.unique(keys, return_inverse=True)
            members = _members(unique, *bucket, inserted, replaced)
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
    return max(_QUERY_KEYS // max(comb(length, places) * comb(places, replaced) for places, replaced in edits), 1)


def _edits(distance: int) -> Iterator[tuple[int, int, int]]:
    """(deleted, inserted, replaced): all that add up to the distance."""
    for deleted in range(distance + 1):
        for inserted in range(distance + 1 - deleted):
            yield deleted, inserted, distance - deleted - inserted


def _members(keys: np.ndarray, ranks: np.ndarray, prefixes: np.ndarray, inserted: int, replaced: int) -> np.ndarray:
    """int64, ascending: place in `keys` (ascending) and rank of all strings of one length with such a pattern."""
    bits = np.uint64(64 - max(len(keys) - 1, 1).bit_length() - 4)
    begins = np.zeros(
        1 << int(64 - bits), bool
    )  # of hashes that are looked for; most of the vocabulary's are not among them
    begins[keys >> bits] = True
    found = []
    for begin in range(0, len(ranks), _BLOCK_KEYS):
        block = ranks[begin : begin + _BLOCK_KEYS]
        for patterns in _patterns(prefixes[:, begin : begin + _BLOCK_KEYS], inserted, replaced):
            pattern, string = np.nonzero(begins[patterns >> bits])
            likely = patterns[pattern, string]
            place = np.minimum(np.searchsorted(keys, likely), len(keys) - 1)
            equal = keys[place] == likely
            found.append(place[equal] << _RANK_BITS | block[string[equal]])
    return np.sort(np.concatenate(found))


def _prefix_hashes(codes: np.ndarray) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of the first 0, 1, 2 ... characters: uint64 [length + 1, n] of codes [n, length]."""
    hashes = np.zeros((codes.shape[1] + 1, codes.shape[0]), np.uint64)
    for place, column in enumerate(codes.T):
        hashes[place + 1] = hashes[place] * _BASE + _mixed(column)
    return hashes


def _mixed(codes: np.ndarray) -> np.ndarray:
    """SplitMix64: neighbouring code points are far from each other."""
    mixed = codes.astype(np.uint64) * _WILDCARD
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def _patterns(prefixes: np.ndarray, left_out: int, wild: int) -> Iterator[np.ndarray]:
    """Hashes of the strings' patterns, some at a time: uint64 [c, n] of prefix hashes [length + 1, n]."""
    length, count = prefixes.shape[0] - 1, prefixes.shape[1]
    places, wildcard = _places(length, left_out, wild)
    powers = np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(length, _BASE)]))
    step = max(_BLOCK_KEYS // count, 1)
    for begin in range(0, len(places), step):
        edits = range(left_out + wild)
        hashes, behind = np.zeros(1, np.uint64), np.zeros(len(places[begin : begin + step]), np.int64)
        for edit in edits:  # the characters between two edits are taken over as a whole
            at, kept = places[begin : begin + step, edit], wildcard[begin : begin + step, edit]
            hashes = (hashes - prefixes[behind]) * powers[at - behind, None] + prefixes[at]
            hashes = (
                hashes * np.where(kept, _BASE, np.uint64(1))[:, None] + np.where(kept, _WILDCARD, np.uint64(0))[:, None]
            )
            behind = at + 1
        yield (hashes - prefixes[behind]) * powers[length - behind, None] + prefixes[[length]]


@cache
def _places(length: int, left_out: int, wild: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a string is edited, int64 [c, edits], ascending in each row, and which of the edits are wildcards: bool."""
    edits = left_out + wild
    places = list(combinations(range(length), edits))
    wildcards = [[edit in chosen for edit in range(edits)] for chosen in combinations(range(edits), wild)]
    return (
        np.repeat(np.array(places, np.int64).reshape(len(places), edits), len(wildcards), axis=0),
        np.tile(np.array(wildcards, bool).reshape(len(wildcards), edits), (len(places), 1)),
    )
