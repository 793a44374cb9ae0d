"""Finds the source row that a target row may learn from.

It is the row that has read the same bytes. If there is none, it is the row of the source token in which the
target's token begins.
"""

import numpy as np

from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans


def align_boundaries(source_starts: np.ndarray, target_starts: np.ndarray) -> np.ndarray:
    """Source row for every target row, or -1.

    source_starts [r], target_starts [m]: bytes read before the token that each row predicts
    (`TokenSpans.starts`). They do not decrease, and cover one response or several concatenated ones. Returns
    int32 [m].

    The rule is equality of prefixes, not of tokens: only then do both rows predict the same next byte.
    Several rows share a start if their tokens lie inside the template's white space (a lone `▁` before the
    first digit). Such groups are paired from their last rows backwards, because the last row has read all the
    white space. If the target's group is longer, its remaining rows take the first row of the source's group.
    Raises ValueError if an array decreases.
    """
    for name, starts in (("source_starts", source_starts), ("target_starts", target_starts)):
        falls = starts[1:] < starts[:-1]
        if falls.any():
            raise ValueError(f"{name} decreases at row {1 + int(np.argmax(falls))}")
    # The group of source rows with this start is first ... last; it is empty if last < first.
    first = np.searchsorted(source_starts, target_starts, side="left")
    last = np.searchsorted(source_starts, target_starts, side="right") - 1
    # The number of later rows in the target's own group. As many rows are counted back from `last`.
    rows_behind = (
        np.searchsorted(target_starts, target_starts, side="right") - 1 - np.arange(len(target_starts))
    )
    return np.where(last >= first, np.maximum(last - rows_behind, first), -1).astype(np.int32)


def find_source_rows(source: TokenSpans, target: TokenSpans) -> tuple[np.ndarray, np.ndarray]:
    """The source row of every target row, int32 [m], and `inside`, bool [m].

    The first choice is the source row that has read the same bytes (`align_boundaries`). If there is none, it
    is the row of the source token in which the target's token begins: only then `inside` is true. Otherwise
    the row is -1.
    Stop rows pair with stop rows, and turns never mix: a stop row starts at the end of its turn, one byte
    before the next turn. A lossy row has no partner on either side, because the bytes of its token are not
    known.
    """
    if not len(source):
        return np.full(len(target), -1, np.int32), np.zeros(len(target), bool)
    same = align_boundaries(source.starts, target.starts)
    # `before` is the last source row that starts earlier, -1 if there is none: then `row` is -1 as well,
    # whatever the index -1 reads below.
    before = np.searchsorted(source.starts, target.starts).astype(np.int32) - 1
    inside = (same < 0) & (target.starts < source.ends[before])
    row = np.where(inside, before, same)
    known = (row >= 0) & ~target.has(SpanFlag.LOSSY) & ~source.has(SpanFlag.LOSSY)[row]
    return np.where(known, row, np.int32(-1)), known & inside
