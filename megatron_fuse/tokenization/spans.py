"""The places of tokens in the bytes of responses. Alignment needs to know nothing else of either side."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np


class SpanFlag(IntFlag):
    """Special properties of a row."""

    LEADING = 1
    """The token begins in the template's white space before its turn: `▁Sure` for the response `Sure`."""
    STOP = 2
    """The row predicts the stop token of its turn."""
    LOSSY = 4
    """The token's bytes are not those of the response (an unknown character, normalised text).

    Nothing is known of such a row, so it takes no part in alignment."""


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """One row per supervised token, in order, of one response or of several concatenated ones; r rows.

    tokens int32 [r]. starts, ends int64 [r]: the token covers bytes [start, end) of `response_bytes`. flags
    uint8 [r]. Starts do not decrease. A token inside the template's white space is empty (start == end). The
    stop token covers the one byte that stands for the end of its turn.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    flags: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def has(self, flag: SpanFlag) -> np.ndarray:
        """bool [r]: whether each row has the flag."""
        return (self.flags & flag) != 0

    @property
    def bytes_spelled(self) -> int:
        """The number of bytes of the responses that their tokens spell."""
        return int((self.ends - self.starts)[(self.flags & (SpanFlag.STOP | SpanFlag.LOSSY)) == 0].sum())

    @classmethod
    def join(cls, parts: Sequence["TokenSpans"], offsets: Sequence[int] | np.ndarray) -> "TokenSpans":
        """Concatenates responses. offsets: the place where each response begins in the concatenated bytes."""
        moved = [
            (part.tokens, part.starts + o, part.ends + o, part.flags)
            for part, o in zip(parts, offsets, strict=True)
        ]
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8))
        return cls(*(np.concatenate(arrays) for arrays in zip(nothing, *moved, strict=True)))


def response_bytes(turns: Sequence[str]) -> bytes:
    """UTF-8 of the supervised turns, concatenated. One zero byte after each turn stands for its end."""
    return b"".join(turn.encode() + b"\0" for turn in turns)
