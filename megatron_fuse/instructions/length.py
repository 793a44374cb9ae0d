"""Cutting a response to the length that every model can read: once, before any other stage."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from megatron_fuse.chat import ChatFormat
from megatron_fuse.instructions.examples import Example
from megatron_fuse.tokenization.spans import response_bytes


def _cut_at_character(data: bytes, length: int) -> bytes:
    """The longest prefix of at most `length` bytes that ends between two characters."""
    while length > 0 and length < len(data) and data[length] & 0xC0 == 0x80:
        length -= 1
    return data[:length]


def fit(
    example: Example,
    formats: Iterable[tuple[str, ChatFormat]],
    seq_length: int,
    *,
    policy: str = "truncate",
    every_turn: bool = False,
) -> Example | str:
    """The example, its response cut where needed so that the conversation has at most `seq_length` tokens in every model.

    formats: (name, chat format), the target's first. every_turn: the assistant's earlier turns are labels too, which never
    are cut. A whole response counts with its stop token, a cut one has none. The cut is at the last token end of the tightest
    model that is also a character's end. Returns the reason where the example is to be left out.
    """
    earlier = [turn["content"] for turn in example.messages if every_turn and turn["role"] == "assistant"]
    offset = len(response_bytes(earlier))
    response = example.response.encode()
    truncated = False
    tokens = 0
    formats = list(formats)
    pending = list(enumerate(formats))
    while pending:
        index, (name, chat) = pending.pop(0)
        encoded = chat.encode_conversation(
            example.prompt(chat.system), response.decode(), stop=not truncated, every_turn=every_turn
        )
        if index == 0:
            tokens = len(encoded.ids)
        if len(encoded.ids) <= seq_length:
            continue
        if policy == "drop":
            return f"{len(encoded.ids)} tokens for {name}, seq_length is {seq_length}"
        own = np.searchsorted(encoded.spans.starts, offset)  # the response's first row
        ends = encoded.spans.ends[own:] - offset
        prompt_length = len(encoded.ids) - len(ends)
        kept = seq_length - prompt_length
        end = int(ends[kept - 1]) if kept > 0 else 0
        # Where only the stop token is too much the text stays whole; after that every further cut takes a byte at least.
        response = _cut_at_character(response, min(end, len(response) - truncated))
        if not response.strip():
            room = "room for white space only" if kept > 0 and end else "no room"
            return f"the prompt leaves {room}: {prompt_length} tokens for {name}, seq_length is {seq_length}"
        truncated = True
        pending = list(enumerate(formats))  # a cut may split a token, so that those who fitted are asked again
    return replace(example, response=response.decode(), truncated=truncated, target_tokens=tokens)
