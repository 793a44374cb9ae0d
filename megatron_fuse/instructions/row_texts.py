"""Texts of a row: what counts as one, and why another value does not."""

from typing import Any

from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.storage.records import quoted

Row = dict[str, Any]


def text(row: Row, key: str, *, optional: bool = False) -> str:
    """A text of a row or turn; of a list of text parts their whole. Optional: "" where there is none."""
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
    raise BadRow(Kind.NOT_TEXT, f"{key} is a list with {quoted(part)}, which is no text part {{type: text, text}}")


def characters(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no character
        reason = f"{key} holds half a surrogate pair at character {error.start}"
        raise BadRow(Kind.BAD_ID if key == "id" else Kind.NOT_TEXT, reason) from error
    return value
