"""The nearest piece by comparing with every one, with the textbook's edit distance."""

from collections.abc import Sequence


def edit_distance(one: Sequence, other: Sequence) -> int:
    """Fewest insertions, deletions and replacements that turn one into the other: a row of the table at a
    time.
    """
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def nearest_of_all(piece: bytes, vocabulary: Sequence[bytes]) -> bytes:
    """Least distance in characters (stray bytes are such); then the longest common beginning; then byte
    order.
    """
    text = piece.decode("utf-8", "surrogateescape")

    def key(other: bytes) -> tuple[int, int, bytes]:
        distance = edit_distance(text, other.decode("utf-8", "surrogateescape"))
        shared = max(size for size in range(len(piece) + 1) if other.startswith(piece[:size]))
        return distance, -shared, other

    return min(vocabulary, key=key)
