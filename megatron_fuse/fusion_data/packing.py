"""Which documents share a sequence: packing by length alone, so that every rank comes to the same result without talking."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


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
