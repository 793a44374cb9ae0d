"""Reads YAML files by the core schema of YAML 1.2, within limits, with the line of every key.

The core schema knows null, true, false and numbers. Every other value is text, and every value in quotes is
text. YAML 1.1 reads some values differently, such as `yes`, `0777` (511) and `1:30` (90). Such a value raises
an error that states both readings, because many programs still read YAML 1.1. Tags (`!!int`) raise an error.
Anchors, aliases and `<<` are allowed, as long as the content stays within the limit after they are replaced.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from megatron_fuse.errors import UserError, shortened
from megatron_fuse.text_safety import printable

Keys = tuple[int | str, ...]  # path of a key, from the outermost one; an int is an index in a list
Place = Callable[[Keys], str]  # what an error calls a key: file, line and key

LIMIT = 1 << 20  # bytes of a file; also characters and values after every alias is replaced by its content
DEPTH = 64  # of nested lists and mappings
_TOO_DEEP = f"more than {DEPTH} lists and mappings inside each other"

_INT, _FLOAT, _BOOL, _NULL, _TEXT, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str", "merge")
)
_AMBIGUOUS = "tag:yaml.org,2002:ambiguous"  # defined here; no file can contain it, as tags raise an error
_DIGITS = "[0-9](?:_?[0-9])*"
# The first pattern that matches decides. Underscores between digits come from YAML 1.1; every reader takes
# them for a number.
_PLAIN = {
    _NULL: r"(?:~|null|Null|NULL|)",
    _BOOL: r"(?:true|True|TRUE|false|False|FALSE)",
    _MERGE: r"<<",
    _AMBIGUOUS: r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|[-+]?0[0-9_]+|[-+]?0b[01_]+"
    rf"|[-+]?{_DIGITS}(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)",
    _INT: rf"(?:[-+]?{_DIGITS}|0o[0-7]+|[-+]?0x[0-9a-fA-F](?:_?[0-9a-fA-F])*)",
    _FLOAT: rf"(?:[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
}
_TRUE_IN_1_1 = ("yes", "on")


class _Refusal(ConstructorError):
    """The error for content that is valid YAML, but is not accepted here."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(problem=problem, problem_mark=mark)


@dataclass(frozen=True)
class Document:
    """A YAML file: its content, and the line of every key."""

    path: Path
    content: dict[str, Any]
    _root: yaml.MappingNode

    def line_of(self, keys: Sequence[int | str]) -> int | None:
        """Line, from 1, of a key given by its path of keys and list indexes; None if the file lacks it."""
        node, line = self._root, None
        for key in keys:
            if isinstance(node, yaml.MappingNode):
                matching = [(name, value) for name, value in node.value if name.value == key]
                if not matching:
                    return None
                name, node = matching[-1]  # keys that `<<` inserts come before the mapping's own keys
                line = name.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
                line = node.start_mark.line + 1
            else:
                return None
        return line

    def place(self, keys: Sequence[int | str]) -> str:
        """`FILE:LINE: a.b.c` of a key.

        If the file lacks the key, the line is that of the innermost mapping around it.
        """
        lines = (self.line_of(keys[:length]) for length in range(len(keys), 0, -1))
        line = next((line for line in lines if line is not None), None)
        where = shortened(str(self.path), 200) if line is None else f"{shortened(str(self.path), 200)}:{line}"
        return f"{where}: {shown(keys)}" if keys else where


def shown(keys: Sequence[int | str]) -> str:
    """A path of keys as `a.b.0.c`: always one short, printable line."""
    return shortened(printable(".".join(map(str, keys))), 150)


class _Loader(yaml.SafeLoader):
    """A loader for the core schema within LIMIT and DEPTH, without tags.

    Keys of mappings must be texts and differ.
    """

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[Any]]] = {}  # not those of YAML 1.1

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._size = 0
        self._anchored: dict[str, int] = {}  # anchor -> size of its content, with aliases in it replaced

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level == DEPTH:  # checked here, because the scanner takes long for deeper nesting
            raise _Refusal(_TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._size
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias:
            if event.anchor in self.anchors and event.anchor not in self._anchored:
                raise _Refusal(f"the alias *{event.anchor} is used inside its own value", event.start_mark)
            self._size += self._anchored.get(event.anchor, 0)
        elif event.tag is not None:
            tag = shortened(event.tag.replace("tag:yaml.org,2002:", "!!"), 60)
            raise _Refusal(f"the tag {tag} is not supported. Write the value without it.", event.start_mark)
        else:
            self._size += 1 + (len(event.value) if isinstance(event, yaml.ScalarEvent) else 0)
        if self._size > LIMIT:
            raise _Refusal(
                f"the file holds more than {LIMIT} characters and values once aliases are replaced",
                event.start_mark,
            )
        if self._depth == DEPTH:
            raise _Refusal(_TOO_DEEP, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias and event.anchor is not None:
            self._anchored[event.anchor] = self._size - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value):
            if key.tag == _AMBIGUOUS:
                self.construct_object(key)  # raises the error that states both readings
            if key.tag not in (_TEXT, _MERGE):
                shown = f" {shortened(key.value, 60)}" if isinstance(key, yaml.ScalarNode) else ""
                raise _Refusal(f"the key{shown} is not text. Put it in quotes.", key.start_mark)
            # The second value, for example of a source, would silently replace the first.
            if key.value in seen:
                raise _Refusal(f"the key {shortened(repr(key.value), 60)} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def text(self, node: yaml.ScalarNode) -> str:
        try:  # JSON, which is also YAML, may write a character above U+FFFF as a surrogate pair
            text = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError as error:
            raise _Refusal(
                f"{shortened(ascii(node.value), 60)} holds half of a character", node.start_mark
            ) from error
        if "\0" in text:
            raise _Refusal(f"{shortened(ascii(text), 60)} holds a NUL", node.start_mark)
        return text

    def truth(self, node: yaml.ScalarNode) -> bool:
        return node.value.lower() == "true"

    def integer(self, node: yaml.ScalarNode) -> int:
        digits = node.value.lower().replace("_", "")
        base = 8 if digits.startswith("0o") else 16 if "0x" in digits else 10
        if len(digits) > 20 or not -(2**63) <= (value := int(digits, base)) < 2**64:
            raise _Refusal(f"{shortened(node.value, 60)} does not fit into a 64-bit integer", node.start_mark)
        return value

    def real(self, node: yaml.ScalarNode) -> float:
        digits = node.value.lower().replace("_", "")
        if digits.endswith((".inf", ".nan")):
            return float(digits.replace(".", ""))
        value = float(digits)
        if value in (float("inf"), float("-inf")) or (
            value == 0 and re.search("[1-9]", digits.partition("e")[0])
        ):
            raise _Refusal(f"{shortened(node.value, 60)} does not fit into a 64-bit number", node.start_mark)
        return value

    def ambiguous(self, node: yaml.ScalarNode) -> None:
        value = node.value
        if value.isalpha():
            meant = str(value.lower() in _TRUE_IN_1_1).lower()
            both, fix = f"{meant} in YAML 1.1 and text in YAML 1.2", f'write {meant}, or "{value}" in quotes'
        elif ":" in value:
            both, fix = (
                "a number to the base 60 in YAML 1.1 and text in YAML 1.2",
                f'write the number, or "{value}" in quotes',
            )
        elif "b" in value:
            both, fix = (
                "a binary number in YAML 1.1 and text in YAML 1.2",
                f'write the number, or "{value}" in quotes',
            )
        else:
            both, fix = (
                "octal in YAML 1.1 and decimal in YAML 1.2",
                "write it without the 0, or as 0o... if it is octal",
            )
            if re.fullmatch("[-+]?[0-7]{1,20}", value):
                both = f"{int(value, 8)} in YAML 1.1 (octal) and {int(value)} in YAML 1.2"
                fix = f"write {int(value, 8)} or {int(value)}"
        raise _Refusal(f"{shortened(node.value, 60)} is {both}: {fix}", node.start_mark)


for _tag, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"{_pattern}\Z"), None)
for _tag, _construct in {
    _TEXT: _Loader.text,
    _BOOL: _Loader.truth,
    _INT: _Loader.integer,
    _FLOAT: _Loader.real,
    _AMBIGUOUS: _Loader.ambiguous,
}.items():
    _Loader.add_constructor(_tag, _construct)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes every text which YAML 1.1 or the core schema would read as another type.

    Writes no aliases.
    """

    def ignore_aliases(self, _: Any) -> bool:
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        # Double quotes, because other quotes would turn these line separators into a newline.
        style = '"' if re.search("[\x85\u2028\u2029]", value) else None
        return self.represent_scalar(_TEXT, value, style=style)


_Dumper.add_representer(str, _Dumper.text)

for _tag, _pattern in _PLAIN.items():
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"{_pattern}\Z"), None)


def read_document(path: Path) -> Document:
    """The mapping in a YAML file, with the lines of its keys.

    Raises UserError, with the line, if the file is not YAML, is too large, is no mapping, or has a key twice.
    """
    shown = shortened(str(path), 200)
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror})") from error
    if len(data) > LIMIT:
        raise UserError(
            f"{shown}: larger than {LIMIT} bytes, so it is not a file of options. Name the right file."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError(f"{shown}:{line}: not valid YAML: {error}. Save the file as UTF-8.") from error
    if control := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = 1 + text.count("\n", 0, control.start())
        raise UserError(
            f"{shown}:{line}: not valid YAML: it holds the control character {control[0]!a}. Remove this "
            "character."
        )
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        content = None if root is None else loader.construct_document(root)
    except _Refusal as error:
        raise UserError(f"{shown}:{error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{shown}:{mark.line + 1}: not valid YAML: {shortened(problem, 300)}") from error
    # The last two come from escapes and directives.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        line = loader.get_mark().line + 1
        raise UserError(f"{shown}:{line}: not valid YAML: {shortened(str(error), 300)}") from error
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        state = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{shown}: must be a mapping of keys, but {state}")
    return Document(path, content, root)


def plain_value(text: str) -> Any:
    """The value of a text that stands in a file without quotes: a number, a truth value, None or the text.

    Raises ValueError if the text would raise an error in a file.
    """
    loader = _Loader("")
    try:
        return loader.construct_object(
            yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
        )
    except ConstructorError as error:
        raise ValueError(error.problem) from error


def dump_yaml(content: dict[str, Any]) -> str:
    """The content as YAML. read_document and readers of YAML 1.1 read the same content back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
