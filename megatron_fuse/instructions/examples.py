"""An example: what every stage works on. A file's row becomes one in rows.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NotRequired  # pydantic reads no other TypedDict in Python 3.11

from typing_extensions import TypedDict

from megatron_fuse.chat.tool_rendering import has_tools
from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import quoted


class Function(TypedDict):
    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    id: str
    type: str  # function
    function: Function


class Message(TypedDict):
    role: str  # user, assistant, tool; of a prompt also system
    content: str
    reasoning_content: NotRequired[str]  # the assistant's thought before the turn, for templates that print it
    supervised: NotRequired[bool]  # false: an assistant turn that is context only, also where every turn is learned
    tool_calls: NotRequired[list[ToolCall]]  # an assistant turn that calls tools: context only
    name: NotRequired[str]  # of a tool's turn: the tool
    tool_call_id: NotRequired[str]  # of a tool's turn: the call that it answers


@dataclass(frozen=True)
class Example:
    """One instruction with its ground-truth response."""

    id: str
    system: str | None
    messages: list[Message]  # user and assistant in turn, up to the response: the last one is the user's, or a tool's
    response: str  # the last assistant turn
    truncated: bool = False  # the response was cut to fit: its end is no end of an answer
    held_out: bool = False
    target_tokens: int = 0  # of the whole conversation in the target's template, the stop token included
    category: str | None = None  # the row's own, for reports
    reasoning: str | None = None  # the thought before the response: context, where the model's template prints it
    tools: list[dict[str, Any]] | None = None  # offered to the assistant: {type: function, function: {name, ...}}

    def prompt(self, default_system: str | None = None) -> list[Message]:
        """Messages that a model answers: the system message, where the example or the model has one, comes first."""
        system = self.system if self.system is not None else default_system
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return first + self.messages

    @property
    def uses_tools(self) -> bool:
        """Whether it offers tools, or has calls or outputs of any."""
        return has_tools(self.messages, self.tools)

    def as_row(self) -> dict[str, Any]:
        """As it is written: `tools` only where there are any, so that other examples are stored as before there were tools."""
        row = asdict(self)
        return row if self.tools else {key: row[key] for key in row if key != "tools"}


@contextmanager
def naming_example(example: Example) -> Iterator[None]:
    """Adds the example, and what to do, to a UserError about one with tools. Instructions leave out what a model of the recipe cannot
    read, but one that joins the run later may meet it."""
    try:
        yield
    except UserError as error:
        if not example.uses_tools:
            raise
        raise UserError(
            f"{error} (example {quoted(example.id)}): choose another chat_template, or remove the run's instructions and prepare "
            "them again, which leaves out what a model of the recipe cannot read"
        ) from error
