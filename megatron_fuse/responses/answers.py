"""An answer, whoever gave it and however it was got."""

from collections.abc import Callable
from dataclasses import dataclass

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


# (number of the shard, its examples) -> their answers in order; None where there is none to be had.
Answerer = Callable[[int, list[Example]], list[Response | None]]
