"""The nearest string of a vocabulary by edit distance, without comparing every pair.

Levenshtein distance counts the insertions, deletions and replacements of single characters. For most strings
the nearest string is at distance 1 or 2: these are found by equal patterns (`edit_patterns`). The other
strings are compared only with strings that have enough characters in common: a distance is never less than
the longer length minus the number of common characters.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from megatron_fuse.alignment.edit_patterns import LONGEST, NO_RANK, PatternIndex, code_points, queries_at_once


def characters(piece: bytes) -> str:
    """The string that is compared: the UTF-8 characters of the bytes.

    A byte that is part of no character becomes a character of its own. Equal strings have equal bytes,
    because surrogateescape can be undone.
    """
    return piece.decode("utf-8", "surrogateescape")


def nearest_pieces(
    pieces: Sequence[bytes], vocabulary: Sequence[bytes], progress: Callable[[int], None] = lambda _: None
) -> np.ndarray:
    """Per piece the index of the vocabulary's nearest piece: int64 [len(pieces)], -1 if the vocabulary is
    empty.

    If several are at the least distance, the one that shares the longest beginning with the piece, in bytes,
    is taken; if several share that too, the first of them in byte order is taken. So the choice does not
    depend on the numbering of the vocabulary. A character that the vocabulary lacks is at distance 1 from
    every other character; it goes to its first byte if that byte is a token.
    progress is called with the number of pieces that have just been decided.
    """
    if not len(vocabulary):
        return np.full(len(pieces), -1, dtype=np.int64)
    # From here on a piece of the vocabulary is named by its rank in
    # byte order. The last line translates back.
    order = np.array(sorted(range(len(vocabulary)), key=vocabulary.__getitem__))
    search = _Search([vocabulary[index] for index in order])
    ranks = np.full(len(pieces), -1, dtype=np.int64)
    for distance in range(len(LONGEST)):
        for indices in _look_ups(pieces, np.flatnonzero(ranks < 0), distance):
            ranks[indices] = search.at_distance(distance, [pieces[index] for index in indices])
            progress(int(np.count_nonzero(ranks[indices] >= 0)))
    for index in np.flatnonzero(ranks < 0).tolist():
        ranks[index] = search.by_comparing(pieces[index])
        progress(1)
    return order[ranks]


def _look_ups(pieces: Sequence[bytes], indices: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Groups of indices of pieces, as many as one look-up takes. All pieces of a group have the same length.

    Pieces longer than `LONGEST` are left out.
    """
    for length, chosen in _by_length([characters(pieces[index]) for index in indices]).items():
        # A look-up at this distance expects that the smaller distances were searched without success.
        if length <= min(LONGEST[: distance + 1]):
            step = queries_at_once(length, distance)
            yield from (indices[chosen[begin : begin + step]] for begin in range(0, len(chosen), step))


def _by_length(texts: Sequence[str]) -> dict[int, np.ndarray]:
    """Length -> the places of the texts of this length, ascending."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}


class _Search:
    """Two ways to the rank of the nearest piece. ranked: the vocabulary in byte order; a rank is a place
    in it.
    """

    def __init__(self, ranked: list[bytes]) -> None:
        self._ranked = ranked
        self._candidates = [characters(piece) for piece in ranked]
        self._patterns = PatternIndex(self._candidates)

    def at_distance(self, distance: int, pieces: list[bytes]) -> np.ndarray:
        """Per piece the rank of the nearest one, -1 if it is farther than `distance`: int64 [n].

        All pieces have the same number of characters, and nothing in the vocabulary is nearer to them than
        `distance`.
        """
        texts = [characters(piece) for piece in pieces]
        neighbours = self._patterns.neighbours(texts, len(texts[0]), distance)
        # The neighbours that share the longest beginning with a piece stand
        # directly beside it in byte order. They say at which rank the strings with
        # that beginning start; the first neighbour from there on is the choice.
        own_ranks = np.fromiter((bisect_left(self._ranked, piece) for piece in pieces), np.int64, len(pieces))
        before, after = neighbours.last_before(own_ranks).tolist(), neighbours.first_from(own_ranks).tolist()
        beside = zip(pieces, before, after, strict=True)
        lowest = [
            self._most_alike(piece, [rank for rank in ranks if 0 <= rank < NO_RANK])
            for piece, *ranks in beside
        ]
        ranks = neighbours.first_from(np.array(lowest, np.int64))
        ranks[ranks == NO_RANK] = -1
        for index in np.flatnonzero(ranks >= 0):
            # Two different patterns may have equal hashes by chance.
            if Levenshtein.distance(texts[index], self._candidates[ranks[index]]) != distance:
                ranks[index] = self.by_comparing(pieces[index])
        return ranks

    def by_comparing(self, piece: bytes) -> int:
        """The rank of the nearest one, however far it is."""
        ranks = self._characters.least_distant(characters(piece))
        own_place = np.searchsorted(ranks, bisect_left(self._ranked, piece))
        lowest = self._most_alike(piece, ranks[max(own_place - 1, 0) : own_place + 1].tolist())
        return int(ranks[np.searchsorted(ranks, lowest)])

    def _most_alike(self, piece: bytes, beside: list[int]) -> int:
        """The first rank of the strings that share the longest beginning with the piece.

        beside: ranks of the strings directly before and after the place of the piece in byte order. One of
        them has the longest common beginning.
        """
        shared = max((_shared_beginning(piece, self._ranked[rank]) for rank in beside), default=0)
        return bisect_left(self._ranked, piece[:shared])

    @cached_property
    def _characters(self) -> "_SharedCharacters":
        return _SharedCharacters(self._candidates)


class _SharedCharacters:
    """Per character and n = 0, 1 ...: the ranks of the strings that hold the character more than n times."""

    def __init__(self, candidates: list[str]) -> None:
        self._candidates = candidates
        self._lengths = np.fromiter(map(len, candidates), np.int64, len(candidates))
        by_length = _by_length(candidates)
        counted = [
            _counted_characters([candidates[rank] for rank in ranks], n) for n, ranks in by_length.items()
        ]
        owners = [np.repeat(ranks, length) for length, ranks in by_length.items()]
        every = np.concatenate(counted)
        order = np.argsort(every, kind="stable")
        self._ranks = np.concatenate(owners)[order]
        known, begins = np.unique(every[order], return_index=True)
        self._known = np.append(known, np.iinfo(np.int64).max)  # after every key that can be looked up
        self._begins = np.append(begins, len(order))

    def least_distant(self, text: str) -> np.ndarray:
        """The ranks, ascending, of all candidates at the least distance."""
        # A bound is the least possible distance of a candidate. Candidates are compared by rising bound,
        # until the bound exceeds the best distance so far.
        bounds = np.maximum(self._lengths, len(text)) - self._in_common(text)
        best, bound, compared = int(bounds.max()) + len(text), int(bounds.min()), []
        while bound <= best:
            ranks = np.flatnonzero(bounds == bound)
            if len(ranks):
                near = [self._candidates[rank] for rank in ranks]
                distances = cdist([text], near, scorer=Levenshtein.distance, score_cutoff=best)[0]
                best = min(best, int(distances.min()))  # beyond the cutoff, cdist gives cutoff + 1
                compared.append((ranks, distances))
            bound += 1
        ranks, distances = (np.concatenate(arrays) for arrays in zip(*compared, strict=True))
        return np.sort(ranks[distances == best])

    def _in_common(self, text: str) -> np.ndarray:
        """Per candidate the number of characters that it has in common with the text, wherever they are:
        int64 [V].
        """
        characters_of_text = _counted_characters([text], len(text))
        known = np.searchsorted(self._known, characters_of_text)
        known = known[self._known[known] == characters_of_text]
        owners = [self._ranks[self._begins[index] : self._begins[index + 1]] for index in known]
        return np.bincount(np.concatenate([np.zeros(0, np.int64), *owners]), minlength=len(self._candidates))


def _counted_characters(texts: list[str], length: int) -> np.ndarray:
    """One number per character of n texts of this length: code point << 32 | number of equal ones before it.

    Returns int64 [n * length].
    """
    codes = np.sort(code_points(texts, length).astype(np.int64), axis=1)
    positions = np.arange(length)
    first = np.ones(codes.shape, bool)
    first[:, 1:] = codes[:, 1:] != codes[:, :-1]
    before = positions - np.maximum.accumulate(np.where(first, positions, 0), axis=1)
    return (codes << 32 | before).ravel()


def _shared_beginning(one: bytes, other: bytes) -> int:
    """How many bytes are the same in both before the first that differs."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)
