"""An answer, in the same form for every backend, and what is learned of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_fuse.chat.thoughts import with_thought
from megatron_fuse.instructions import Example


@dataclass(frozen=True)
class Response:
    """One model's answer. An empty one cannot win; a truncated one was cut off by the limit of tokens and has no end."""

    id: str
    response: str
    truncated: bool
    tokens: int  # of the answering model's own tokenizer, the stop token not counted
    refused: bool = False  # it declines to answer, by the server's word or by its opening words
    reasoning: str | None = None  # the thought before the answer, which is no part of it


class Learned(NamedTuple):
    """What models read and learn of a response: its text, whether it ends there, and the thought before it, which is context."""

    text: str
    ends: bool
    thought: str | None = None


def learned_of(answer: Response, reasoning: str) -> Learned:
    """reasoning: the recipe's `data.reasoning`."""
    if answer.truncated and not answer.response.strip():
        return Learned("", False)  # cut off within its thought
    if reasoning == "supervise":
        return Learned(with_thought(answer.reasoning, answer.response), not answer.truncated)
    return Learned(answer.response, not answer.truncated, answer.reasoning if reasoning == "template" else None)


def learned_of_example(example: Example) -> Learned:
    """`data.reasoning` was applied when the instructions were prepared."""
    return Learned(example.response, not example.truncated, example.reasoning)


# (number of the shard, its examples) -> their answers in order; None where there is none to be had.
Answerer = Callable[[int, list[Example]], list[Response | None]]
