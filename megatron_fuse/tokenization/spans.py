"""Where the tokens of responses lie in their bytes: all that alignment needs to know of either side."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np


class SpanFlag(IntFlag):
    """What is special about a row."""

    LEADING = 1
    """The token begins in the template's white space before its turn: `▁Sure` for a response that begins `Sure`."""
    STOP = 2
    """The row predicts the stop token of its turn."""
    LOSSY = 4
    """The token's bytes are not the response's (an unknown character, normalised text): nothing may be said of it."""


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """One row per supervised token, in order, of one response or of many; r rows.

    tokens int32 [r]; starts, ends int64 [r]: the token covers bytes [start, end) of `response_bytes`; flags uint8 [r].
    Starts do not decrease. A token inside the template's white space is empty (start == end). The stop token covers the
    one byte that stands for the end of its turn.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    flags: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def has(self, flag: SpanFlag) -> np.ndarray:
        """bool [r]"""
        return (self.flags & flag) != 0

    @property
    def bytes_spelled(self) -> int:
        """Bytes of the responses that their tokens spell."""
        return int((self.ends - self.starts)[(self.flags & (SpanFlag.STOP | SpanFlag.LOSSY)) == 0].sum())

    @classmethod
    def join(cls, parts: Sequence["TokenSpans"], offsets: Sequence[int] | np.ndarray) -> "TokenSpans":
        """Responses one after the other; offsets: where each one's bytes begin in all their bytes on end."""
        moved = [
            (part.tokens, part.starts + o, part.ends + o, part.flags) for part, o in zip(parts, offsets, strict=True)
        ]
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8))
        return cls(*(np.concatenate(arrays) for arrays in zip(nothing, *moved, strict=True)))


def response_bytes(turns: Sequence[str]) -> bytes:
    """UTF-8 of the supervised turns on end, each followed by one zero byte that stands for its end."""
    return b"".join(turn.encode() + b"\0" for turn in turns)
