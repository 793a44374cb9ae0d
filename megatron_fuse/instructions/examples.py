"""An example: what every stage works on. A file's row becomes one in rows.py."""

from dataclasses import dataclass
from typing import NotRequired  # pydantic reads no other TypedDict in Python 3.11

from typing_extensions import TypedDict


class Message(TypedDict):
    role: str
    content: str
    reasoning_content: NotRequired[str]  # the assistant's thought before the turn, for templates that print it
    supervised: NotRequired[bool]  # false: an assistant turn that is context only, also where every turn is learned


@dataclass(frozen=True)
class Example:
    """One instruction with its ground-truth response."""

    id: str
    system: str | None
    messages: list[Message]  # user and assistant in turn, the last one is the user's
    response: str  # the last assistant turn
    truncated: bool = False  # the response was cut to fit: its end is no end of an answer
    held_out: bool = False
    target_tokens: int = 0  # of the whole conversation in the target's template, the stop token included
    category: str | None = None  # the row's own, for reports
    reasoning: str | None = None  # the thought before the response: context, where the model's template prints it

    def prompt(self, default_system: str | None = None) -> list[Message]:
        """Messages that a model answers: the system message, where the example or the model has one, comes first."""
        system = self.system if self.system is not None else default_system
        return ([] if system is None else [{"role": "system", "content": system}]) + self.messages
