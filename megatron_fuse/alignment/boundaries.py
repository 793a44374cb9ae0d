"""Which source row has read exactly the bytes that a target row has read."""

import numpy as np

from megatron_fuse.errors import UserError

UNMATCHED = ("skip",)
"""What may be done with a target row whose start lies inside a source token: `skip` leaves it to cross-entropy."""


def align_boundaries(source_starts: np.ndarray, target_starts: np.ndarray, *, unmatched: str = "skip") -> np.ndarray:
    """Source row for every target row, or -1.

    source_starts [n], target_starts [m]: byte offset in the response at which the token predicted by each row begins
    (`EncodedConversation.starts`: the end of the token before, 0 for the first, the response's length for the stop
    row), not decreasing. Returns int32 [m].

    The rule is equality of prefixes, not of tokens: only then do both rows predict the same next byte. Rows share a
    start when tokens lie inside the template's white space (a lone `▁` before the first digit): such groups are
    paired from their last rows backwards, because the last row is the one that has read all the white space; rows
    that the target has more of take the source's first. A source without stop token has no row that starts at the
    response's end, so a target's stop row then finds none.
    Raises ValueError if an array decreases, UserError for a name of `unmatched` that is not known.
    """
    if unmatched not in UNMATCHED:
        raise UserError(f"alignment.unmatched: {unmatched!r} is not one of {', '.join(UNMATCHED)}")
    source, target = np.asarray(source_starts), np.asarray(target_starts)
    for name, starts in (("source_starts", source), ("target_starts", target)):
        if np.any(np.diff(starts) < 0):
            raise ValueError(f"{name} decreases at row {int(np.argmax(np.diff(starts) < 0)) + 1}")
    first = np.searchsorted(source, target, side="left")
    last = np.searchsorted(source, target, side="right") - 1
    rows_behind = np.searchsorted(target, target, side="right") - 1 - np.arange(len(target))  # in the target's group
    return np.where(last >= first, np.maximum(last - rows_behind, first), -1).astype(np.int32)
