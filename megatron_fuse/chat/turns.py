"""The messages of a conversation, as templates and labels see them."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_fuse.chat.nested_texts import texts_in

# Each message is {role, content}. An assistant turn may also have reasoning_content (its thought),
# supervised: false (its mask) and tool_calls. A tool's turn may have name and tool_call_id.
# instructions/examples.py defines these forms.
Messages = Sequence[Mapping[str, Any]]


def texts_of(turns: Messages) -> list[str]:
    return [
        text for turn in turns for key, value in turn.items() if key != "role" for text in texts_in(value)
    ]


def for_template(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that only this project uses.

    Templates read the thought under one of two names.
    """
    shown = {
        key: turn[key] for key in ("role", "content", "tool_calls", "name", "tool_call_id") if key in turn
    }
    thought = turn.get("reasoning_content")
    return shown | ({"reasoning_content": thought, "thinking": thought} if thought else {})


def supervised_turns(messages: Messages, response: str, *, every_turn: bool) -> list[str]:
    """The texts of the supervised turns. `EncodedConversation.spans` counts in their bytes."""
    earlier = [message["content"] for message in messages if may_be_learned(message)]
    return [*(earlier if every_turn else []), response]


def may_be_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is an assistant turn without a mask ({supervised: false}) and without calls of tools.

    Calls are not learned, because each model writes them in a form of its own: no bytes are common to all
    models.
    """
    return (
        message["role"] == "assistant"
        and bool(message.get("supervised", True))
        and "tool_calls" not in message
    )
