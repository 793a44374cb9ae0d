"""The reasons why a row or an example is left out."""

from enum import StrEnum


class Kind(StrEnum):
    """The kinds of reasons, by which the listings are counted. docs/data.md explains each kind."""

    MISSING = "value missing"
    NOT_TEXT = "value not text"
    NO_TURNS = "no list of turns"
    UNKNOWN_ROLE = "unknown role"
    TOOLS = "tools"
    LATE_SYSTEM = "system turn not first"
    SAME_ROLE = "consecutive turns of one role"
    NO_ANSWER = "no assistant turn"
    EMPTY = "empty prompt or response"
    BAD_MASK = "mask neither 0 nor 1"
    MASKED = "nothing to learn: masked"
    BAD_ID = "unusable id"
    AMBIGUOUS_ID = "one id for different rows"
    COPY = "copy of an earlier row"
    TOO_LONG = "longer than seq_length"
    NO_ROOM = "no room behind the prompt"


class BadRow(Exception):
    """A row that cannot be used; str() is the reason."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
