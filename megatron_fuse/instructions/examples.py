"""From a user's rows in one of four common forms to examples, with every row that cannot be used listed by line and reason."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.instructions.tables import read_table
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.storage.records import quoted
from megatron_fuse.text_safety import brief

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One instruction with its ground-truth response."""

    id: str
    system: str | None
    messages: list[Message]  # {role, content}: user and assistant in turn, the last one is the user's
    response: str  # the last assistant turn
    truncated: bool = False  # the response was cut to fit: its end is no end of an answer
    held_out: bool = False
    target_tokens: int = 0  # of the whole conversation in the target's template, the stop token included
    category: str | None = None  # the row's own, for reports

    def prompt(self, default_system: str | None = None) -> list[Message]:
        """Messages that a model answers: the system message, where the example or the model has one, comes first."""
        system = self.system if self.system is not None else default_system
        return ([] if system is None else [{"role": "system", "content": system}]) + self.messages


class _BadRow(Exception):
    """Why a row cannot be used."""


def _text(row: dict[str, Any], key: str, *, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _BadRow(f"{key} is missing" if value is None else f"{key} is a {type(value).__name__}, not text")
    return _characters(value, key)


def _characters(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no character
        raise _BadRow(f"{key} holds half a surrogate pair at character {error.start}") from error
    return text


_Turns = tuple[str, list[Message]]  # system message ("" = none) and all turns, the response last


def _alpaca(row: dict[str, Any]) -> _Turns:
    instruction, further = _text(row, "instruction"), _text(row, "input", optional=True)
    question = f"{instruction}\n\n{further}" if further.strip() else instruction
    return _text(row, "system", optional=True), _pair(question, _text(row, "output"))


def _orca(row: dict[str, Any]) -> _Turns:
    return _text(row, "system_prompt", optional=True), _pair(_text(row, "question"), _text(row, "response"))


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _conversation(row: dict[str, Any], key: str, role_key: str, text_key: str) -> _Turns:
    turns = row.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRow(f"{key} is missing or no list of turns")
    messages = []
    for turn in turns:
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise _BadRow(f"{role_key} of a turn is {quoted(role)}; known are {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[role], "content": _text(turn, text_key)})
    system = _text(row, "system", optional=True)
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    while messages and messages[-1]["role"] == "user":  # a question that nobody answered
        messages.pop()
    return system, messages


@dataclass(frozen=True)
class _Form:
    marks: tuple[str, ...]  # a row with any of these keys is in this form
    keys: str
    read: Callable[[dict[str, Any]], _Turns]


_FORMS = {
    "messages": _Form(
        ("messages",), "messages:[{role, content}]", lambda row: _conversation(row, "messages", "role", "content")
    ),
    "sharegpt": _Form(
        ("conversations",),
        "conversations:[{from, value}]",
        lambda row: _conversation(row, "conversations", "from", "value"),
    ),
    "orca": _Form(("question", "system_prompt"), "system_prompt, question, response", _orca),
    "alpaca": _Form(("instruction",), "instruction, input, output", _alpaca),
}


def _detect_form(path: Path) -> str:
    """The form of the first row that bears the mark of any."""
    first: list[str] = []
    for _, row in read_table(path):
        first = first or sorted(row)
        for name, form in _FORMS.items():
            if any(mark in row for mark in form.marks):
                return name
    known = "; ".join(f"{name} {{{form.keys}}}" for name, form in _FORMS.items())
    found = f"the first row has the keys {brief(', '.join(first), 150)}" if first else "it has no row with any key"
    raise UserError(f"{path}: no row in a known form ({known}); {found}")


def _example(row: dict[str, Any], form: _Form) -> Example:
    system, turns = form.read(row)
    if not turns:
        raise _BadRow("no assistant turn")
    expected = ["user", "assistant"] * (len(turns) // 2)
    if [turn["role"] for turn in turns] != expected:
        raise _BadRow("user and assistant do not take turns")
    *messages, response = turns
    if not response["content"].strip():
        raise _BadRow("the response is empty")
    if not messages[-1]["content"].strip():
        raise _BadRow("the prompt is empty")
    given = row.get("id")
    if given is None:
        # From content, so that it stays the same when rows are added, removed or sorted.
        given = sha256_of_json([system, turns])[:16]
    elif isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise _BadRow(f"id is {quoted(given)}, neither text nor a whole number")
    name = _characters(str(given), "id")
    category = row.get("category")
    category = _characters(category, "category") if isinstance(category, str) and category else None
    return Example(name, system or None, messages, response["content"], category=category)


@dataclass(frozen=True)
class Rows:
    """Which rows of a file can be used. Their texts stay in the file."""

    path: Path
    form: str
    lines: dict[str, int]  # id -> line (of a table: row), in the file's order
    bad: list[dict[str, Any]]  # {line, reason}

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, ids: Collection[str] | None = None) -> Iterator[Example]:
        """The usable rows, or those of these ids, in the file's order."""
        lines = {self.lines[name] for name in (self.lines if ids is None else ids)}
        for line, row in read_table(self.path):
            if line in lines:
                yield _example(row, _FORMS[self.form])


def read_rows(path: Path, form: str = "auto") -> Rows:
    """Looks through rows (see tables.py) in Alpaca, ShareGPT, messages or Orca form; `auto` takes the first row's.

    Alpaca and ShareGPT rows may have a `system` column. Rows without response or prompt, or with a value of a wrong type, are
    listed, and so are copies of an earlier row that have no id of their own. Raises UserError for a line that is no JSON object,
    for a file without known rows and for an id given twice (naming both lines).
    """
    name = _detect_form(path) if form == "auto" else form
    bad: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    for line, row in read_table(path):
        try:
            example = _example(row, _FORMS[name])
            if example.id in lines:
                if row.get("id") is not None:
                    raise UserError(
                        f"{path}:{line}: id {quoted(example.id)} was given in line {lines[example.id]} already: "
                        "make ids unique, or leave them out to have them made from the content"
                    )
                raise _BadRow(f"the same as line {lines[example.id]}")
        except _BadRow as reason:
            bad.append({"line": line, "reason": str(reason)})
            continue
        lines[example.id] = line
    return Rows(path, name, lines, bad)
