"""Computes how large a value of a chat template will be, before it is made.

There is a function for every operator, method and filter whose result can be larger than its arguments.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

from megatron_fuse.chat.meter import Meter, current_meter

BITS = 100_000  # the most bits of a whole number
_WIDTH = re.compile(r"\d+")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


def operator_size(operator: str, left: Any, right: Any, meter: Meter) -> int:
    """The size of the operator's result."""
    if isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        )
        return 0 if bits <= BITS else meter.largest + bits
    if operator == "*":
        number, value = (left, right) if isinstance(left, int) else (right, left)
        many = isinstance(number, int) and isinstance(value, str | bytes | list | tuple)
        return max(number, 0) * meter.size(value) if many else 0
    if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        return len(left) + len(right)
    if operator == "%" and isinstance(left, str | bytes):
        return _percent_size(left, right, meter)
    return 0


def _percent_size(form: Any, values: Any, meter: Meter) -> int:
    """The size of `form % values`. Every place could hold all values, with the widest width."""
    places = list(_PERCENT.finditer(form if isinstance(form, str) else form.decode("latin-1")))
    widths = [_number(width) for place in places for width in place.groups() if width and width != "*"]
    if any("*" in place.groups() for place in places):
        widths += [abs(value) for value in _flat(values) if isinstance(value, int)]
    return len(form) + len(places) * (meter.size(values) + max(widths, default=0))


def format_size(form: str, values: Sequence[Any], meter: Meter) -> int:
    """The size of `form.format(*values)`, with the same bound as `_percent_size`."""
    specs = [spec or "" for _, field, spec, _ in Formatter().parse(form) if field is not None]
    widths = [_number(width) for spec in specs for width in _WIDTH.findall(spec)]
    if any("{" in spec for spec in specs):
        widths += [_number(width) for value in _flat(values) for width in _WIDTH.findall(str(value)[:100])]
    return len(form) + len(specs) * (meter.size(list(values)) + max(widths, default=0))


def _flat(values: Any) -> list[Any]:
    values = list(values.values()) if isinstance(values, Mapping) else values
    return list(values) if isinstance(values, list | tuple) else [values]


def _number(digits: str) -> int:
    return int(digits[:12])


def result_size(
    table: Mapping[str, Callable[..., int]], name: str, args: tuple, kwargs: dict[str, Any]
) -> int:
    """The size of a function's result, by the table.

    It is 0 if the function is not in the table, or refuses the arguments itself.
    """
    size = table.get(name)
    if size is None:
        return 0
    try:
        return size(*args, **kwargs)
    except (TypeError, ValueError, AttributeError, KeyError):
        return 0


def _replaced(text: Any, old: Any, new: Any, count: Any = None, **_: Any) -> int:
    text = text if isinstance(text, str | bytes) else str(text)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _glued(values: Any, between: Any = "", **_: Any) -> int:
    return len(between) * len(values) if hasattr(values, "__len__") else 0


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    return len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width))


def _wrapped(
    text: str, width: int = 79, break_long_words: bool = True, wrapstring: Any = None, **_: Any
) -> int:
    return len(text) + (len(text) // max(width, 1) + text.count("\n") + 1) * len(wrapstring or "\n")


def _as_json(value: Any, indent: Any = None, separators: Any = (), **_: Any) -> int:
    """json.dumps writes the indent before every member, once for each level, so long indents are refused."""
    widths = [indent if isinstance(indent, int) else len(indent or ""), *map(len, separators or ())]
    return 0 if max(widths) <= 64 else _NEVER


def _few(limit: int) -> Callable[..., int]:
    """For functions whose second argument is a number: one above this limit has no use, so it is refused."""

    def size(value: Any, number: Any = 0, *_: Any, **named: Any) -> int:
        given = [number, *named.values()]
        return _NEVER if any(isinstance(each, int) and abs(each) > limit for each in given) else 0

    return size


_NEVER = 10**12
_COLUMNS = _few(100_000)
METHODS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": lambda between, values: _glued(values, between),
    "center": _COLUMNS,
    "ljust": _COLUMNS,
    "rjust": _COLUMNS,
    "zfill": _COLUMNS,
    "to_bytes": _COLUMNS,
    "expandtabs": lambda text, tabsize=8: (
        len(text) + text.count("\t" if isinstance(text, str) else b"\t") * tabsize
    ),
    "translate": lambda text, table: (
        len(text) * max((len(new) for new in table.values() if isinstance(new, str)), default=1)
    ),
}
FILTERS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": _glued,
    "center": _COLUMNS,
    "batch": _COLUMNS,
    "slice": _COLUMNS,
    "round": _few(300),
    "indent": _indented,
    "wordwrap": _wrapped,
    "tojson": _as_json,
    "format": lambda form, *values, **named: _percent_size(form, named or values, current_meter()),
    "pprint": lambda value, *_: 40 * current_meter().size(value),
}
