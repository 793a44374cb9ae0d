"""Jinja for untrusted templates: time, memory and output are bounded, and the text is the same in every run.

A chat template is a program that comes with a model. Jinja's sandbox keeps it away from the machine. But the
sandbox does not stop an endless loop, or a value of 10 GB. Here every loop, call, operator, filter, literal
and block goes through a `Meter` (chat/meter.py). It counts steps and sizes (chat/sizes.py), and refuses a
value that is too large before it is computed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from itertools import chain
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from megatron_fuse.chat.meter import Meter, TemplateLimit, current_meter, metered
from megatron_fuse.chat.nested_texts import texts_in
from megatron_fuse.chat.sizes import FILTERS, METHODS, format_size, operator_size, result_size

SOURCE = 256 * 1024  # characters of a template; the longest published ones have 30,000


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which templates can do the same as in transformers, under the limits of a Meter."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_countable, **options)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {_EACH: _each, _CUT: _cut, _JOINED: _joined, _MADE: _made}
        self.filters["random"] = _refusal("the filter `random` makes a different prompt in every run")
        self.globals["lipsum"] = _refusal("`lipsum` makes a different prompt in every run")

    def bound(self, name: str, function: Callable[..., Any]) -> None:
        """Sets a filter, under the same limits as Jinja's own filters."""
        self.filters[name] = _bounded(name, function)

    def compile(self, source: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(source, str) and len(source) > SOURCE:
            raise TemplateLimit(f"it has {len(source):,} characters, more than {SOURCE:,}")
        with metered(Meter()):  # Jinja computes constant expressions while it compiles
            return super().compile(source, *arguments, **options)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        return super()._generate(_Metering().visit(source), *arguments, **options)

    def concat(self, parts: Iterable[str]) -> str:
        """Joins what a template, a macro or a block prints."""
        meter = current_meter()
        texts = list(parts)
        size = sum(map(len, texts))
        meter.expect(size)
        meter.step(size)
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = current_meter()
        if operator == "+" and type(left) is str and type(right) is str:  # a fast path for nine of ten cases
            meter.expect(len(left) + len(right))
            meter.step(len(left) + len(right))
            return left + right
        meter.expect(operator_size(operator, left, right, meter))
        return meter.admit(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = tuple(_listed(value) for value in args)
            meter.expect(result_size(METHODS, __obj.__name__, (owner, *args), kwargs))
        elif isinstance(__obj, LoopContext) and args:
            args = (_each(args[0]), *args[1:])
        return meter.admit(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(value)
        def bounded(*args: Any, **kwargs: Any) -> str:
            meter = current_meter()
            meter.expect(format_size(value.__self__, (*args, *kwargs.values()), meter))
            return meter.admit(wrapped(*args, **kwargs))

        return bounded


def render_bounded(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    **names: Any,
) -> str:
    """Renders a template under the limits. Raises TemplateLimit, and all errors of Jinja."""
    values = [value for message in messages for value in message.values()]
    texts = list(chain.from_iterable(map(texts_in, [*values, *(tools or ())])))
    with metered(Meter(len(messages), sum(map(len, texts)))) as meter:
        text = template.render(messages=messages, tools=tools, **names)
    if len(text) > meter.longest_output:
        raise TemplateLimit(f"it prints {len(text):,} characters, more than {meter.longest_output:,}")
    if " at 0x" in text and not any(" at 0x" in given for given in texts):
        raise TemplateLimit("it prints the address of an object in memory, which is different in every run")
    return text


# Names of filters for syntax that Jinja has no hook for. They have
# spaces, so that no template can write them.
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
        return _filter(
            node.node, _CUT, *(end or nodes.Const(None) for end in (cut.start, cut.stop, cut.step))
        )

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filter(node, _MADE)

    visit_Dict = visit_Tuple = visit_List


def _filter(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _each(values: Any) -> Iterator[Any]:
    step = current_meter().step
    for value in values:
        step()
        yield value


def _listed(value: Any) -> Any:
    """A list of a generator's members, so that they can be counted before they are joined."""
    return list(_each(value)) if isinstance(value, Iterator) else value


def _cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
    return current_meter().admit(value[start:stop:step])


def _joined(parts: list[Any]) -> str:
    meter = current_meter()
    return meter.admit("".join([part if type(part) is str else str(_countable(part)) for part in parts]))


def _made(value: Any) -> Any:
    return current_meter().admit(value)


def _countable(value: Any) -> Any:
    """Checks the size of a value that is about to be printed, and returns the value."""
    if type(value) is not str and isinstance(value, list | tuple | dict | Namespace):
        meter = current_meter()
        meter.expect(meter.size(value))
    return value


def _refusal(reason: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TemplateLimit(reason)

    return refuse


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its arguments and its result counted.

    `wraps` keeps its marks for Jinja (`pass_environment`).
    """
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        if name == "join":
            args = (*args[:first], _listed(args[first]), *args[first + 1 :])
        for value in args[first:]:
            _countable(value)
        meter.expect(result_size(FILTERS, name, args[first:], kwargs))
        return meter.admit(function(*args, **kwargs))

    return bounded
