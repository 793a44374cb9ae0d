"""The four common forms of a row, and how a file's form is found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.instructions.row_texts import Row, text
from megatron_fuse.instructions.tables import read_table
from megatron_fuse.instructions.turns import Turns, conversation, pair
from megatron_fuse.text_safety import brief


@dataclass(frozen=True)
class Form:
    name: str
    marks: tuple[str, ...]  # a row with any of these keys is in this form
    keys: str
    read: Callable[[Row], Turns]  # raises BadRow


def _alpaca(row: Row) -> Turns:
    instruction, further = text(row, "instruction"), text(row, "input", optional=True)
    question = f"{instruction}\n\n{further}" if further.strip() else instruction
    return pair(text(row, "system", optional=True), question, text(row, "output"))


def _orca(row: Row) -> Turns:
    return pair(text(row, "system_prompt", optional=True), text(row, "question"), text(row, "response"))


def _messages(row: Row) -> Turns:
    return conversation(row, "messages", "role", "content")


def _sharegpt(row: Row) -> Turns:
    return conversation(row, "conversations", "from", "value")


FORMS = {
    form.name: form
    for form in (
        Form("messages", ("messages",), "messages:[{role, content}]", _messages),
        Form("sharegpt", ("conversations",), "conversations:[{from, value}]", _sharegpt),
        Form("orca", ("question", "system_prompt"), "system_prompt, question, response", _orca),
        Form("alpaca", ("instruction",), "instruction, input, output", _alpaca),
    )
}


def detect_form(path: Path) -> Form:
    """The form of the first row that has the mark of a form. Raises UserError if no row has one."""
    first: list[str] = []
    for _, row in read_table(path):
        first = first or sorted(row)
        for form in FORMS.values():
            if any(mark in row for mark in form.marks):
                return form
    known = "; ".join(f"{form.name} {{{form.keys}}}" for form in FORMS.values())
    keys = f"the first row has the keys {brief(', '.join(first), 150)}" if first else "no row has any key"
    raise UserError(f"{path}: no row has a known form ({known}); {keys}")
