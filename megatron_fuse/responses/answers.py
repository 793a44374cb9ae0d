"""An answer in the form that all backends share, and the part of it that models learn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_fuse.chat.thoughts import with_thought
from megatron_fuse.instructions import Example


@dataclass(frozen=True)
class Response:
    """One model's answer.

    An empty answer cannot win. A truncated one was cut off by the token limit: it has no end.
    """

    id: str
    response: str
    truncated: bool
    tokens: int  # counted by the answering model's tokenizer, without the stop token
    refused: bool = False  # the answer declines the request, as the server says or by its opening words
    reasoning: str | None = None  # the thought before the answer; it is not part of the answer


class Learned(NamedTuple):
    """What models read and learn of a response.

    text: the text that is learned. ends: whether the response ends there. thought: the thought before it, as
    context.
    """

    text: str
    ends: bool
    thought: str | None = None


def learned_of(answer: Response, reasoning: str) -> Learned:
    """The part of an answer that is learned. reasoning: the recipe's `data.reasoning`."""
    if answer.truncated and not answer.response.strip():
        return Learned("", False)  # the answer was cut off within its thought
    if reasoning == "supervise":
        return Learned(with_thought(answer.reasoning, answer.response), not answer.truncated)
    return Learned(
        answer.response, not answer.truncated, answer.reasoning if reasoning == "template" else None
    )


def learned_of_example(example: Example) -> Learned:
    """The part of a ground truth that is learned. The instructions have applied `data.reasoning` already."""
    return Learned(example.response, not example.truncated, example.reasoning)


# (number of the shard, its examples) -> their answers in order; None if there is no answer.
Answerer = Callable[[int, list[Example]], list[Response | None]]
