"""Which source row a target row may learn from: the one that has read the same bytes, else the one whose token it is in."""

import numpy as np

from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans


def align_boundaries(source_starts: np.ndarray, target_starts: np.ndarray) -> np.ndarray:
    """Source row for every target row, or -1.

    source_starts [r], target_starts [m]: bytes read before the token that each row predicts, not decreasing
    (`TokenSpans.starts`), of one response or of many on end. Returns int32 [m].

    The rule is equality of prefixes, not of tokens: only then do both rows predict the same next byte. Rows share a
    start when tokens lie inside the template's white space (a lone `▁` before the first digit): such groups are
    paired from their last rows backwards, because the last row is the one that has read all the white space; rows
    that the target has more of take the source's first.
    Raises ValueError if an array decreases.
    """
    for name, starts in (("source_starts", source_starts), ("target_starts", target_starts)):
        falls = starts[1:] < starts[:-1]
        if falls.any():
            raise ValueError(f"{name} decreases at row {1 + int(np.argmax(falls))}")
    first = np.searchsorted(source_starts, target_starts, side="left")
    last = np.searchsorted(source_starts, target_starts, side="right") - 1
    rows_behind = np.searchsorted(target_starts, target_starts, side="right") - 1 - np.arange(len(target_starts))
    return np.where(last >= first, np.maximum(last - rows_behind, first), -1).astype(np.int32)


def find_source_rows(source: TokenSpans, target: TokenSpans) -> tuple[np.ndarray, np.ndarray]:
    """The source row of every target row, int32 [m], and whether the target's token begins inside the source's, bool [m].

    A row that has read the same bytes (`align_boundaries`); else, with `inside`, the row of the token that the
    target's begins inside of; else -1. Stop rows pair with stop rows and turns never mix, since a stop row starts at the
    end of its turn, a byte before the next. A lossy row takes no row and gives none: what its token says is not known.
    """
    if not len(source):
        return np.full(len(target), -1, np.int32), np.zeros(len(target), bool)
    same = align_boundaries(source.starts, target.starts)
    before = np.searchsorted(source.starts, target.starts).astype(np.int32) - 1  # last source row that starts earlier
    inside = (same < 0) & (target.starts < source.ends[before])
    row = np.where(inside, before, same)
    known = (row >= 0) & ~target.has(SpanFlag.LOSSY) & ~source.has(SpanFlag.LOSSY)[row]
    return np.where(known, row, np.int32(-1)), known & inside
