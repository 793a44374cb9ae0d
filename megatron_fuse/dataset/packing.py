"""Which documents share a sequence: packing by length alone, so that every rank comes to the same result without talking."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_evenly(
    groups: Sequence[Sequence[int] | np.ndarray], capacity: int, multiple: int = 1
) -> list[list[list[int]]]:
    """`pack` of each group by itself, at the least common capacity that does not cost a step more sequences.

    A step's sequences are all as long as its longest, and come in a multiple of ranks: of 1000 positions of capacity 700, as two
    sequences, 400 would be padding, while two of 500 have none. groups: lengths as for `pack`. multiple: what the number of
    sequences, all groups together, is rounded up to. Raises ValueError as `pack` does.
    """

    def packed(capacity: int) -> list[list[list[int]]]:
        return [pack(lengths, capacity) for lengths in groups]

    def count(sequences: list[list[list[int]]]) -> int:
        return sum(map(len, sequences))

    best = packed(capacity)
    allowed = -(-count(best) // multiple) * multiple
    longest = max((int(max(lengths, default=0)) for lengths in groups), default=0)
    low, high = max(longest, 1), capacity  # `best` is of capacity `high`, and takes no more than `allowed`
    while low < high:
        middle = (low + high) // 2
        found = packed(middle)
        if count(found) <= allowed:
            best, high = found, middle
        else:
            low = middle + 1
    return best


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest sequence that still has room for it.

    lengths [n] in positions, at least 1; capacity in positions. Returns the documents of every sequence, in ascending order;
    each document is in exactly one, whole. A pure function: equal lengths go in their order, of equally full sequences the one
    begun first is taken. For many documents at most 11/9 of the fewest sequences possible (Johnson et al. 1974, "Worst-case
    performance bounds for simple one-dimensional packing algorithms").
    Raises ValueError where a document has no position or is longer than the capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    misfits = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(misfits):
        document = int(misfits[0])
        raise ValueError(
            f"document {document} takes {lengths[document]} positions, not 1 to {capacity}: it is never split"
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
