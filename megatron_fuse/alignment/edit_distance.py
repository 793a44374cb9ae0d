"""The nearest string of a vocabulary by edit distance, without comparing every pair.

Levenshtein distance counts the insertions, deletions and replacements of single characters. Most strings have a nearest
one at distance 1 or 2: these are found by equal patterns (`edit_patterns`). The others are compared with the strings that
share enough characters: a distance is never less than the longer length minus the characters in common.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from megatron_fuse.alignment.edit_patterns import LONGEST, NO_RANK, PatternIndex, code_points, queries_at_once


def characters(piece: bytes) -> str:
    """The string that is compared: UTF-8 characters, and every byte that is part of none as a character of its own.

    Equal strings have equal bytes (surrogateescape can be undone).
    """
    return piece.decode("utf-8", "surrogateescape")


def nearest_pieces(
    pieces: Sequence[bytes], vocabulary: Sequence[bytes], progress: Callable[[int], None] = lambda _: None
) -> np.ndarray:
    """Per piece the index of the vocabulary's nearest piece: int64 [len(pieces)], -1 if the vocabulary is empty.

    Of several at the least distance, the one that shares the longest beginning with the piece, in bytes; of those the
    first in byte order. So the choice does not depend on the vocabulary's numbering, and a character that the
    vocabulary lacks (at distance 1 from every other) goes to its first byte where that is a token.
    progress is called with the number of pieces that have just been decided.
    """
    if not len(vocabulary):
        return np.full(len(pieces), -1, dtype=np.int64)
    order = np.array(sorted(range(len(vocabulary)), key=vocabulary.__getitem__))
    search = _Search([vocabulary[index] for index in order])
    ranks = np.full(len(pieces), -1, dtype=np.int64)
    for distance in range(len(LONGEST)):
        for places in _look_ups(pieces, np.flatnonzero(ranks < 0), distance):
            ranks[places] = search.at_distance(distance, [pieces[place] for place in places])
            progress(int(np.count_nonzero(ranks[places] >= 0)))
    for place in np.flatnonzero(ranks < 0).tolist():
        ranks[place] = search.by_comparing(pieces[place])
        progress(1)
    return order[ranks]


def _look_ups(pieces: Sequence[bytes], places: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """The places of pieces with one number of characters, as many as one look-up takes; none of the longest ones."""
    for length, chosen in _by_length([characters(pieces[place]) for place in places]).items():
        if length <= min(LONGEST[: distance + 1]):  # looked up at every smaller distance too, without a find
            step = queries_at_once(length, distance)
            yield from (places[chosen[begin : begin + step]] for begin in range(0, len(chosen), step))


def _by_length(texts: Sequence[str]) -> dict[int, np.ndarray]:
    """Length -> the places of the texts that have it, ascending."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}


class _Search:
    """Two ways to the rank of the nearest piece. ranked: the vocabulary in byte order; a rank is a place in it."""

    def __init__(self, ranked: list[bytes]) -> None:
        self._ranked = ranked
        self._candidates = [characters(piece) for piece in ranked]
        self._patterns = PatternIndex(self._candidates)

    def at_distance(self, distance: int, pieces: list[bytes]) -> np.ndarray:
        """Per piece the rank of the nearest one, -1 if it is farther than `distance`: int64 [n].

        All pieces have one number of characters, and nothing in the vocabulary is nearer to them than `distance`.
        """
        texts = [characters(piece) for piece in pieces]
        neighbours = self._patterns.neighbours(texts, len(texts[0]), distance)
        own = np.fromiter((bisect_left(self._ranked, piece) for piece in pieces), np.int64, len(pieces))
        beside = zip(pieces, neighbours.last_before(own).tolist(), neighbours.first_from(own).tolist(), strict=True)
        lowest = [self._most_alike(piece, [rank for rank in ranks if 0 <= rank < NO_RANK]) for piece, *ranks in beside]
        ranks = neighbours.first_from(np.array(lowest, np.int64))
        ranks[ranks == NO_RANK] = -1
        for place in np.flatnonzero(ranks >= 0):
            if Levenshtein.distance(texts[place], self._candidates[ranks[place]]) != distance:  # equal hashes by chance
                ranks[place] = self.by_comparing(pieces[place])
        return ranks

    def by_comparing(self, piece: bytes) -> int:
        """The rank of the nearest one, however far it is."""
        ranks = self._characters.least_distant(characters(piece))
        own = np.searchsorted(ranks, bisect_left(self._ranked, piece))
        lowest = self._most_alike(piece, ranks[max(own - 1, 0) : own + 1].tolist())
        return int(ranks[np.searchsorted(ranks, lowest)])

    def _most_alike(self, piece: bytes, beside: list[int]) -> int:
        """The first rank of any piece that begins like the piece as far as one of these does.

        In byte order, a longest common beginning is found beside the place where the piece itself would stand.
        """
        shared = max((_shared_beginning(piece, self._ranked[rank]) for rank in beside), default=0)
        return bisect_left(self._ranked, piece[:shared])

    @cached_property
    def _characters(self) -> "_SharedCharacters":
        return _SharedCharacters(self._candidates)


class _SharedCharacters:
    """For each character, and for each time that a string has it, the ranks of the strings that have it so often."""

    def __init__(self, candidates: list[str]) -> None:
        self._candidates = candidates
        self._lengths = np.fromiter(map(len, candidates), np.int64, len(candidates))
        by_length = _by_length(candidates)
        counted = [_counted_characters([candidates[rank] for rank in ranks], n) for n, ranks in by_length.items()]
        owners = [np.repeat(ranks, length) for length, ranks in by_length.items()]
        every = np.concatenate(counted)
        order = np.argsort(every, kind="stable")
        self._ranks = np.concatenate(owners)[order]
        known, begins = np.unique(every[order], return_index=True)
        self._known = np.append(known, np.iinfo(np.int64).max)  # behind all that can be asked for
        self._begins = np.append(begins, len(order))

    def least_distant(self, text: str) -> np.ndarray:
        """The ranks, ascending, of all candidates at the least distance."""
        bounds = np.maximum(self._lengths, len(text)) - self._in_common(text)
        best, bound, found = int(bounds.max()) + len(text), int(bounds.min()), []
        while bound <= best:
            ranks = np.flatnonzero(bounds == bound)
            if len(ranks):
                near = [self._candidates[rank] for rank in ranks]
                distances = cdist([text], near, scorer=Levenshtein.distance, score_cutoff=best)[0]
                best = min(best, int(distances.min()))  # whatever lies beyond the cutoff is given as cutoff + 1
                found.append((ranks, distances))
            bound += 1
        ranks, distances = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return np.sort(ranks[distances == best])

    def _in_common(self, text: str) -> np.ndarray:
        """Per candidate the number of characters that it has in common with the text, wherever they are: int64 [V]."""
        asked = _counted_characters([text], len(text))
        at = np.searchsorted(self._known, asked)
        at = at[self._known[at] == asked]
        owners = [self._ranks[self._begins[place] : self._begins[place + 1]] for place in at]
        return np.bincount(np.concatenate([np.zeros(0, np.int64), *owners]), minlength=len(self._candidates))


def _counted_characters(texts: list[str], length: int) -> np.ndarray:
    """Code point and how many of it are before, as one number, of all characters of texts of one length: int64 [n * length]."""
    codes = np.sort(code_points(texts, length).astype(np.int64), axis=1)
    places = np.arange(length)
    first = np.ones(codes.shape, bool)
    first[:, 1:] = codes[:, 1:] != codes[:, :-1]
    before = places - np.maximum.accumulate(np.where(first, places, 0), axis=1)
    return (codes << 32 | before).ravel()


def _shared_beginning(one: bytes, other: bytes) -> int:
    """How many bytes are the same in both before the first that differs."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
