"""The nearest string of a vocabulary by edit distance, without comparing every pair.

Levenshtein distance counts the insertions, deletions and replacements of single characters. It is never less than the
difference of the two lengths, so candidates are looked at by length, outward from the token's own, until that
difference alone exceeds the best distance found. rapidfuzz computes the distances of a block of strings of one length
to all candidates of one length at once.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

BLOCK = 512  # strings compared at once: with 8000 candidates of one length, a matrix of 4 MB


def characters(piece: bytes) -> str:
    """The string that is compared: UTF-8 characters, and every byte that is part of none as a character of its own.

    Equal strings have equal bytes (surrogateescape can be undone).
    """
    return piece.decode("utf-8", "surrogateescape")


def nearest_pieces(pieces: Sequence[bytes], vocabulary: Sequence[bytes]) -> np.ndarray:
    """Per piece the index of the vocabulary's nearest piece: int64 [len(pieces)], -1 if the vocabulary is empty.

    Of several at the least distance, the one that shares the longest beginning with the piece, in bytes; of those the
    first in byte order. So the choice does not depend on the vocabulary's numbering, and a character that the
    vocabulary lacks (at distance 1 from every other) goes to its first byte where that is a token.
    """
    order = sorted(range(len(vocabulary)), key=vocabulary.__getitem__)
    ranked = [vocabulary[index] for index in order]
    candidates = [characters(piece) for piece in ranked]
    ranks_by_length = _by_length(candidates)
    buckets = {length: (ranks, [candidates[rank] for rank in ranks]) for length, ranks in ranks_by_length.items()}
    texts = [characters(piece) for piece in pieces]
    nearest = np.full(len(pieces), -1, dtype=np.int64)
    if not buckets:
        return nearest
    for length, places in _by_length(texts).items():
        for begin in range(0, len(places), BLOCK):
            block = places[begin : begin + BLOCK]
            for place, ranks in zip(block, _least_distant([texts[i] for i in block], length, buckets), strict=True):
                nearest[place] = order[_most_alike(pieces[place], ranked, ranks)]
    return nearest


def _by_length(texts: Sequence[str]) -> dict[int, np.ndarray]:
    """Length -> the places of the texts that have it, ascending."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}


def _least_distant(texts: list[str], length: int, buckets: dict[int, tuple[np.ndarray, list[str]]]) -> list[np.ndarray]:
    """Per text the ranks, ascending, of all candidates at the least distance. All texts have `length` characters."""
    best = np.full(len(texts), np.iinfo(np.int64).max)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # texts' places, candidates' ranks, distances
    for other in sorted(buckets, key=lambda other: abs(other - length)):
        undecided = np.flatnonzero(best >= abs(other - length))
        if not len(undecided):
            break
        ranks, candidates = buckets[other]
        cutoff = min(int(best[undecided].max()), max(length, other))  # no distance exceeds the longer string
        distances = cdist(
            [texts[i] for i in undecided],
            candidates,
            scorer=Levenshtein.distance,
            score_cutoff=cutoff,  # whatever lies beyond is given as cutoff + 1
            dtype=np.uint8 if cutoff < 255 else np.uint32,  # of uint8, rapidfuzz computes many at once
        )
        best[undecided] = np.minimum(best[undecided], distances.min(axis=1))
        rows, columns = np.nonzero(distances == best[undecided, None])
        found.append((undecided[rows], ranks[columns], best[undecided[rows]]))
    places, ranks, distances = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    kept = distances == best[places]
    places, ranks = places[kept], ranks[kept]
    order = np.lexsort((ranks, places))
    return np.split(ranks[order], np.cumsum(np.bincount(places, minlength=len(texts)))[:-1])


def _most_alike(piece: bytes, ranked: list[bytes], ranks: np.ndarray) -> int:
    """Of these ranks (ascending) the first among those whose pieces share the longest beginning with the piece.

    In byte order, a longest common beginning is found beside the place where the piece itself would stand.
    """
    if len(ranks) == 1:
        return int(ranks[0])
    above = int(np.searchsorted(ranks, bisect_left(ranked, piece)))
    beside = ranks[max(above - 1, 0) : above + 1]
    shared = max(_shared_beginning(piece, ranked[rank]) for rank in beside)
    return int(ranks[np.searchsorted(ranks, bisect_left(ranked, piece[:shared]))])


def _shared_beginning(one: bytes, other: bytes) -> int:
    """How many bytes are the same in both before the first that differs."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
