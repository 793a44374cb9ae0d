"""Reads the texts of a row, and says why another value is not a text."""

from typing import Any

from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.storage.records import quoted

Row = dict[str, Any]


def text(row: Row, key: str, *, optional: bool = False) -> str:
    """A text of a row or turn. A list of text parts is concatenated. optional: "" if there is none.

    Raises BadRow if the value is missing or not text.
    """
    value = row.get(key)
    if isinstance(value, str):
        return characters(value, key)
    if value is None:
        if optional:
            return ""
        raise BadRow(Kind.MISSING, f"{key} is missing")
    if isinstance(value, list):
        return characters("".join(_part(part, key) for part in value), key)
    raise BadRow(Kind.NOT_TEXT, f"{key} is a {type(value).__name__}, not text")


def _part(part: Any, key: str) -> str:
    kind, words = (part.get("type"), part.get("text")) if isinstance(part, dict) else ("text", part)
    if kind == "text" and isinstance(words, str):
        return words
    raise BadRow(
        Kind.NOT_TEXT, f"{key} is a list with {quoted(part)}, which is not a text part {{type: text, text}}"
    )


def characters(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but not a character
        reason = f"{key} holds half a surrogate pair at character {error.start}"
        raise BadRow(Kind.BAD_ID if key == "id" else Kind.NOT_TEXT, reason) from error
    return value
