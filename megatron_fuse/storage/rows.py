"""Values of a user's rows: values under nested keys, ids and texts."""

from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import quoted
from megatron_fuse.text_safety import brief

_EXACT = 2**53  # beyond it, one float stands for several integers


def value_at(row: dict[str, Any], key: str) -> Any:
    """The value under a key whose dots lead into mappings; None if there is no such key.

    A key of the row may itself hold dots. At every step the longest key that exists wins, so that
    `responses.vicuna-7b-v1.5` is found in {"responses": {"vicuna-7b-v1.5": ...}}.
    """
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        head, rest = ".".join(parts[:length]), ".".join(parts[length:])
        if head in row and not rest:
            return row[head]
        if head in row:
            return value_at(row[head], rest) if isinstance(row[head], dict) else None
    return None


def keys_of(row: dict[str, Any]) -> str:
    """The keys of a row as value_at takes them, for errors. Of mappings only the first level is listed."""
    keys = []
    for key, value in row.items():
        keys += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return ", ".join(keys)


def keys_shown(row: dict[str, Any]) -> str:
    """keys_of, cut to 150 characters for a message."""
    return brief(keys_of(row), 150)


def as_id(value: Any) -> str | None:
    """An id, text or an integer, as text; None for any other value. 7.0, as tables write it, becomes 7."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    is_id = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    return str(value) if is_id else None


def id_at(row: dict[str, Any], key: str, place: str) -> str:
    """The id of a row's example. place: file and line, for the error.

    Raises UserError if the value is no id.
    """
    value = value_at(row, key)
    name = as_id(value)
    if name is None:
        raise UserError(
            f"{place}: {key} is {quoted(value)}, but a row needs the id of its example: text or a whole "
            "number"
        )
    return name


def refuse_half_characters(text: str, key: str, place: str) -> None:
    """Raises UserError if a text holds half a surrogate pair: "\\ud800" is valid JSON, but no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {key} holds half a surrogate pair at character {error.start}") from error
