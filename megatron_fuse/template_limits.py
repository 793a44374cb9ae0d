"""Jinja for templates of strangers: bounded in time, memory and output, and the same text at every run.

A chat template is a program that comes with a model. The sandbox of Jinja keeps it from the machine, but not from looping for
ever or from asking for 10 GB. Here every loop, call, operator, filter, literal and block goes through a `Meter`, which counts
steps and sizes and refuses what is beyond any use, before it is computed. What may grow is compared with the messages, so long
conversations are no exception. Nothing depends on the clock but the refusal of a template that computes for `SECONDS`.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from string import Formatter
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SOURCE = 256 * 1024  # characters of a template; the longest published ones have 30,000
OUTPUT = 256 * 1024  # characters that it may print, beside 16 for each of the messages' characters
TEXT = 1_000_000  # characters, or members, of one value
WORK = 15_000_000  # characters of all values together: see Meter
STEP = 150  # what one step counts for
BITS = 100_000  # of a whole number
SECONDS = 20.0  # of this thread's CPU time
_WIDTH = re.compile(r"\d+")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


class TemplateLimit(jinja2.TemplateError):
    """A template that goes beyond a limit, or whose text would differ from run to run."""


class Meter:
    """What one rendering has used. turns, characters: of its messages, which the limits grow with.

    Work is counted in characters that were made; a step of the program counts as STEP of them.
    """

    def __init__(self, turns: int = 0, characters: int = 0) -> None:
        self.work, self.checkpoint = 0, STEP
        self.most_work = WORK + (turns + 16) * characters + STEP * (100 * turns * turns + 10 * characters)
        self.largest = TEXT + 16 * characters
        self.longest_output = OUTPUT + 16 * characters
        self.began = time.thread_time()

    def step(self, characters: int = 0) -> None:
        self.work += STEP + characters
        if self.work > self.checkpoint:
            self._check()

    def _check(self) -> None:
        """At every hundredth step or so, as it reads the clock."""
        self.checkpoint = self.work + 100 * STEP
        if self.work > self.most_work:
            raise TemplateLimit("it computes more than any prompt needs: does a loop of it ever end?")
        if time.thread_time() - self.began > SECONDS:
            raise TemplateLimit(f"it computes for more than {SECONDS:.0f} seconds")

    def expect(self, size: int) -> None:
        """Called before a value of about this size is made."""
        if size > self.largest:
            raise TemplateLimit(f"it makes a value of {size:,} characters, more than {self.largest:,}")

    def admit(self, value: Any) -> Any:
        """Counts a value that was made, and returns it."""
        size = 0
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, list | tuple | dict):
            size = self.size(value)
        if size > self.largest:
            self.expect(size)
        self.step(size)
        return value

    def size(self, value: Any) -> int:
        """Characters and members of a value as it would be printed: what it holds twice counts twice. Stops at `largest`."""
        total, members, stack = 0, 0, [value]
        while stack and total <= self.largest:
            part = stack.pop()
            members += 1
            total += 1
            if isinstance(part, str):
                total += len(part)
            elif isinstance(part, list | tuple):
                stack += part
            elif isinstance(part, dict):
                stack += part.keys()
                stack += part.values()
            elif isinstance(part, Namespace):
                stack += object.__getattribute__(part, "_Namespace__attrs").values()
            if len(stack) > self.largest:
                total = len(stack)
        self.step(members * STEP // 8)
        return total


_meter: ContextVar[Meter] = ContextVar("meter")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates can do what they can do in transformers, under the limits of a Meter."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_countable, **options)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {_EACH: _each, _CUT: _cut, _JOINED: _joined, _MADE: _made}
        self.filters["random"] = _refusal("the filter `random` gives another prompt at every run")
        self.globals["lipsum"] = _refusal("`lipsum` gives another prompt at every run")

    def bound(self, name: str, function: Callable[..., Any]) -> None:
        """Sets a filter, under the same limits as those of Jinja."""
        self.filters[name] = _bounded(name, function)

    def compile(self, source: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(source, str) and len(source) > SOURCE:
            raise TemplateLimit(f"it has {len(source):,} characters, more than {SOURCE:,}")
        with metered(Meter()):  # Jinja computes constant expressions as it compiles
            return super().compile(source, *arguments, **options)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        return super()._generate(_Metering().visit(source), *arguments, **options)

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """What a template, a macro or a block prints."""
        meter = _meter.get()
        found = list(parts)
        size = sum(map(len, found))
        meter.expect(size)
        meter.step(size)
        return "".join(found)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
        if operator == "+" and type(left) is str and type(right) is str:  # nine of ten
            meter.expect(len(left) + len(right))
            meter.step(len(left) + len(right))
            return left + right
        meter.expect(_operator_size(operator, left, right, meter))
        return meter.admit(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = tuple(_listed(value) for value in args)
            meter.expect(_result_size(_METHODS, __obj.__name__, (owner, *args), kwargs))
        elif isinstance(__obj, LoopContext) and args:
            args = (_each(args[0]), *args[1:])
        return meter.admit(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(value)
        def bounded(*args: Any, **kwargs: Any) -> str:
            meter = _meter.get()
            meter.expect(_format_size(value.__self__, (*args, *kwargs.values()), meter))
            return meter.admit(wrapped(*args, **kwargs))

        return bounded


@contextmanager
def metered(meter: Meter) -> Iterator[Meter]:
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


def render_bounded(template: jinja2.Template, messages: Sequence[Mapping[str, str]], **names: Any) -> str:
    """Raises TemplateLimit beside what Jinja raises."""
    texts = [text for message in messages for text in message.values()]
    with metered(Meter(len(messages), sum(map(len, texts)))) as meter:
        text = template.render(messages=messages, **names)
    if len(text) > meter.longest_output:
        raise TemplateLimit(f"it prints {len(text):,} characters, more than {meter.longest_output:,}")
    if " at 0x" in text and not any(" at 0x" in given for given in texts):
        raise TemplateLimit("it prints the address of an object in memory, which is another at every run")
    return text


# Names of filters that no template can write: they stand for syntax that Jinja has no hook for.
_EACH, _CUT, _JOINED, _MADE = "for ", "[:] ", "~ ", "[] "


class _Metering(NodeTransformer):
    """Puts these filters around loops, slices, `~` and literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _EACH)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        cut = node.arg
        if not isinstance(cut, nodes.Slice):
            return node
        return _filter(node.node, _CUT, *(end or nodes.Const(None) for end in (cut.start, cut.stop, cut.step)))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filter(node, _MADE)

    visit_Dict = visit_Tuple = visit_List


def _filter(node: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _each(values: Any) -> Iterator[Any]:
    step = _meter.get().step
    for value in values:
        step()
        yield value


def _listed(value: Any) -> Any:
    """The members of a generator, so that they can be counted before they are joined."""
    return list(_each(value)) if isinstance(value, Iterator) else value


def _cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
    return _meter.get().admit(value[start:stop:step])


def _joined(parts: list[Any]) -> str:
    meter = _meter.get()
    return meter.admit("".join([part if type(part) is str else str(_countable(part)) for part in parts]))


def _made(value: Any) -> Any:
    return _meter.get().admit(value)


def _countable(value: Any) -> Any:
    """A value that is about to be printed."""
    if type(value) is not str and isinstance(value, list | tuple | dict | Namespace):
        meter = _meter.get()
        meter.expect(meter.size(value))
    return value


def _refusal(reason: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TemplateLimit(reason)

    return refuse


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its arguments and its result counted. Its marks for Jinja (`pass_environment`) stay."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        if name == "join":
            args = (*args[:first], _listed(args[first]), *args[first + 1 :])
        for value in args[first:]:
            _countable(value)
        meter.expect(_result_size(_FILTERS, name, args[first:], kwargs))
        return meter.admit(function(*args, **kwargs))

    return bounded


def _operator_size(operator: str, left: Any, right: Any, meter: Meter) -> int:
    """Of what the operator would make."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
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
    """Of `form % values`: every place could hold the largest value, or the widest number."""
    places = list(_PERCENT.finditer(form if isinstance(form, str) else form.decode("latin-1")))
    widths = [_number(width) for place in places for width in place.groups() if width and width != "*"]
    if any("*" in place.groups() for place in places):
        widths += [abs(value) for value in _flat(values) if isinstance(value, int)]
    return len(form) + len(places) * (meter.size(values) + max(widths, default=0))


def _format_size(form: str, values: Sequence[Any], meter: Meter) -> int:
    """Of `form.format(*values)`, as above."""
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


def _result_size(table: Mapping[str, Callable[..., int]], name: str, args: tuple, kwargs: dict[str, Any]) -> int:
    """What a function would make, of those that can make more than they are given; 0 for arguments that it refuses itself."""
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


def _wrapped(text: str, width: int = 79, break_long_words: bool = True, wrapstring: Any = None, **_: Any) -> int:
    return len(text) + (len(text) // max(width, 1) + text.count("\n") + 1) * len(wrapstring or "\n")


def _as_json(value: Any, indent: Any = None, separators: Any = (), **_: Any) -> int:
    """json.dumps writes the indent at every member, once for every level."""
    widths = [indent if isinstance(indent, int) else len(indent or ""), *map(len, separators or ())]
    return 0 if max(widths) <= 64 else _NEVER


def _few(limit: int) -> Callable[..., int]:
    """Of functions whose second argument is a number that nobody needs beyond this limit."""

    def size(value: Any, number: Any = 0, *_: Any, **named: Any) -> int:
        given = [number, *named.values()]
        return _NEVER if any(isinstance(each, int) and abs(each) > limit for each in given) else 0

    return size


_NEVER = 10**12
_COLUMNS = _few(100_000)
_METHODS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": lambda between, values: _glued(values, between),
    "center": _COLUMNS,
    "ljust": _COLUMNS,
    "rjust": _COLUMNS,
    "zfill": _COLUMNS,
    "to_bytes": _COLUMNS,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t" if isinstance(text, str) else b"\t") * tabsize,
    "translate": lambda text, table: (
        len(text) * max((len(new) for new in table.values() if isinstance(new, str)), default=1)
    ),
}
_FILTERS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": _glued,
    "center": _COLUMNS,
    "batch": _COLUMNS,
    "slice": _COLUMNS,
    "round": _few(300),
    "indent": _indented,
    "wordwrap": _wrapped,
    "tojson": _as_json,
    "format": lambda form, *values, **named: _percent_size(form, named or values, _meter.get()),
    "pprint": lambda value, *_: 40 * _meter.get().size(value),
}
