"""Packing: which documents share a sequence. It depends on lengths alone, so that all ranks get the same
result without collectives."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_evenly(
    groups: Sequence[Sequence[int] | np.ndarray], capacity: int, multiple: int = 1
) -> list[list[list[int]]]:
    """`pack` of each group separately, at the smallest common capacity that needs no more sequences than
    `capacity` does.

    All sequences of a step are padded to the longest one, and their number is rounded up to a multiple of the
    ranks. So a smaller capacity can save padding: 1000 positions in two sequences of up to 700 may have 400
    positions of padding, in two of 500 none.

    groups: lengths as for `pack`.
    multiple: the number of sequences of all groups together is rounded up to a multiple of it.

    Returns for each group its sequences, each a list of documents. Raises ValueError as `pack` does.
    """

    def packed(capacity: int) -> list[list[list[int]]]:
        return [pack(lengths, capacity) for lengths in groups]

    def count(sequences: list[list[list[int]]]) -> int:
        return sum(map(len, sequences))

    best = packed(capacity)
    allowed = -(-count(best) // multiple) * multiple
    longest = max((int(max(lengths, default=0)) for lengths in groups), default=0)
    # Bisection. Invariant: `best` is the packing at capacity `high`, and takes at most `allowed` sequences.
    low, high = max(longest, 1), capacity
    while low < high:
        middle = (low + high) // 2
        attempt = packed(middle)
        if count(attempt) <= allowed:
            best, high = attempt, middle
        else:
            low = middle + 1
    return best


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first,
    each into the fullest sequence that still has room for it.

    lengths [n]: positions of each document, at least 1.
    capacity: positions of a sequence.

    Returns the documents of every sequence, in ascending order. Each document is whole and in exactly one
    sequence.

    A pure function: documents of equal length keep their order, and of equally full sequences the oldest
    takes the document. For many documents the result has at most 11/9 of the fewest sequences possible
    (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms").

    Raises ValueError if a document has no position or is longer than the capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    misfits = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(misfits):
        document = int(misfits[0])
        raise ValueError(
            f"document {document} has {lengths[document]} positions, but a document has 1 to {capacity} and "
            "is never split"
        )
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (positions left, sequence), ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect_left(free, (length, 0))
        if place < len(free):
            room, sequence = free.pop(place)
            sequences[sequence].append(document)
        else:
            room, sequence = capacity, len(sequences)
            sequences.append([document])
        insort(free, (room - length, sequence))
    return [sorted(documents) for documents in sequences]
