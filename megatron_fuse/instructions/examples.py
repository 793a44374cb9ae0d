"""An example: the unit that every stage works on. rows.py makes it of a file's row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NotRequired  # pydantic reads no other TypedDict in Python 3.11

from pydantic import Field
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
    role: str  # user, assistant or tool; in a prompt also system
    content: str
    # The assistant's thought before the turn, for templates that print it.
    reasoning_content: NotRequired[str]
    supervised: NotRequired[bool]  # false: a masked assistant turn, which is only context
    tool_calls: NotRequired[list[ToolCall]]  # the assistant's turn calls tools: it is only context
    name: NotRequired[str]  # in a tool's turn: the name of the tool
    tool_call_id: NotRequired[str]  # in a tool's turn: the call that it answers


@dataclass(frozen=True)
class Example:
    """One instruction with its ground-truth response."""

    id: str
    system: str | None
    messages: list[Message]  # user and assistant in turn; the last is the user's or a tool's
    response: str  # the last assistant turn
    truncated: bool = False  # the response was cut to fit, so its end is not the end of an answer
    is_validation: Annotated[bool, Field(validation_alias="held_out")] = False  # kept out of training
    target_tokens: int = 0  # tokens of the whole conversation in the target's template, with the stop token
    category: str | None = None  # the category of the row, for reports
    reasoning: str | None = None  # the thought before the response: context, if the template prints it
    # Offered to the assistant: {type: function, function: {name, ...}}.
    tools: list[dict[str, Any]] | None = None

    def prompt(self, default_system: str | None = None) -> list[Message]:
        """The messages that a model answers.

        The first is the system message, if the example or the model has one.
        """
        system = self.system if self.system is not None else default_system
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return first + self.messages

    @property
    def uses_tools(self) -> bool:
        """Whether the example offers tools, or has calls or outputs of tools."""
        return has_tools(self.messages, self.tools)

    def as_row(self) -> dict[str, Any]:
        """The example as it is written.

        Files name is_validation `held_out`. `tools` is left out if there are none, as in files of older
        versions.
        """
        row = {"held_out" if key == "is_validation" else key: value for key, value in asdict(self).items()}
        return row if self.tools else {key: row[key] for key in row if key != "tools"}


@contextmanager
def naming_example(example: Example) -> Iterator[None]:
    """Adds the example, and what to do, to a UserError about an example with tools.

    Instructions leave out examples that a model of the recipe cannot read. But a model that joins the run
    later may get such an example.
    """
    try:
        yield
    except UserError as error:
        if not example.uses_tools:
            raise
        raise UserError(
            f"{str(error).removesuffix('.')} (example {quoted(example.id)}). Choose another chat_template. "
            "Or remove the instructions of the run and prepare them again: this leaves out examples that a "
            "model of the recipe cannot read."
        ) from error
