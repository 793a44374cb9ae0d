"""Cuts responses to the length that every model can read, and leaves out examples that a model cannot read.

This happens once, before any other stage.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from megatron_fuse.chat import ChatFormat, EncodedConversation, supervised_turns
from megatron_fuse.errors import UserError
from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.instructions.examples import Example
from megatron_fuse.tokenization.spans import response_bytes


def _cut_at_character(data: bytes, length: int) -> bytes:
    """The longest prefix of at most `length` bytes that ends between two characters."""
    while length > 0 and length < len(data) and data[length] & 0xC0 == 0x80:
        length -= 1
    return data[:length]


def _room(encoded: EncodedConversation, offset: int, seq_length: int) -> tuple[int, int]:
    """Where to cut for one model: (tokens before the response, bytes of whole tokens that fit after them).

    encoded: a conversation of more than seq_length tokens. offset: the first byte of the response, in the
    bytes of all supervised turns.
    """
    first_row = np.searchsorted(encoded.spans.starts, offset)
    ends = encoded.spans.ends[first_row:] - offset
    prompt_length = int(np.flatnonzero(encoded.supervised)[first_row])
    kept = seq_length - prompt_length
    # The template may print white space before the stop token, so `kept` may exceed the number of labels.
    return prompt_length, int(ends[min(kept, len(ends)) - 1]) if kept > 0 else 0


def _encoded(
    example: Example, chat: ChatFormat, response: str, *, stop: bool = True, every_turn: bool = False
) -> EncodedConversation:
    """The example with this response, as the model reads it.

    Raises BadRow if the template refuses or does not print an example with tools. For examples without tools,
    UserError is raised as usual.
    """
    messages, thought = example.prompt(chat.system), example.reasoning
    try:
        return chat.encode_conversation(
            messages, response, stop=stop, every_turn=every_turn, reasoning=thought, tools=example.tools
        )
    except UserError as error:
        if not example.uses_tools:
            raise
        raise BadRow(Kind.TOOLS, str(error)) from None


def require_readable(example: Example, formats: Iterable[ChatFormat]) -> None:
    """Raises BadRow if one of these templates refuses an example with tools or does not print it."""
    for chat in formats:
        _encoded(example, chat, example.response)


def fit(
    example: Example,
    formats: Iterable[tuple[str, ChatFormat]],
    seq_length: int,
    *,
    policy: str = "truncate",
    every_turn: bool = False,
) -> Example:
    """The example, with its response cut to fit: at most `seq_length` tokens of conversation in every model.

    formats: (name, chat format), the target's first. every_turn: the assistant's earlier turns are labels
    too; they are never cut. A whole response counts with its stop token; a cut response has none. The cut is
    at the end of a token of the model with the least room, or at the last end of a character before it.
    Raises BadRow if the example must be left out.
    """
    formats = list(formats)
    turns = supervised_turns(example.messages, example.response, every_turn=every_turn)
    offset = len(response_bytes(turns[:-1]))
    response = example.response.encode()
    truncated = False
    lengths: list[int] = []  # tokens in each of the first formats, in which the response fits as it is now
    while len(lengths) < len(formats):
        name, chat = formats[len(lengths)]
        encoded = _encoded(example, chat, response.decode(), stop=not truncated, every_turn=every_turn)
        length = len(encoded.ids)
        if length <= seq_length:
            lengths.append(length)
            continue
        if policy == "drop":
            raise BadRow(Kind.TOO_LONG, f"{length} tokens for {name}, seq_length is {seq_length}")
        prompt_length, room = _room(encoded, offset, seq_length)
        # If only the stop token is too much, the first cut leaves the text whole. Every later cut removes at
        # least one byte, so the loop ends.
        response = _cut_at_character(response, min(room, len(response) - truncated))
        truncated = True
        if not response.strip():
            left = "room for white space only" if room else "no room"
            reason = (
                f"the prompt leaves {left}: {prompt_length} tokens for {name}, seq_length is {seq_length}"
            )
            raise BadRow(Kind.NO_ROOM, reason)
        # A cut may split a token of an earlier format, which then
        # needs more tokens: all formats are checked again.
        lengths.clear()
    return replace(example, response=response.decode(), truncated=truncated, target_tokens=lengths[0])
