"""The content of a row in any form, checked: the system message and turns of user, assistant and tools."""

from typing import Any, NamedTuple

from megatron_fuse.chat.thoughts import split_thought
from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.instructions.examples import Message
from megatron_fuse.instructions.row_texts import Row, text
from megatron_fuse.instructions.tool_turns import (
    CALL_ROLES,
    OUTPUT_ROLES,
    calls_in_text,
    calls_of,
    join_outputs,
    offered_tools,
    output_of,
)
from megatron_fuse.storage.records import quoted


class Turns(NamedTuple):
    """A conversation: user and assistant take turns, and an answer of the assistant is last.

    There is at least one turn of each. Before an answer, the assistant may have turns that call tools. Each
    of them is followed by the tools' turns.
    """

    system: str  # "" if there is none
    turns: list[Message]
    began_with_answer: bool = False  # the assistant's turn before the first question was left out
    tools: list[dict[str, Any]] | None = None  # the tools that the row offers


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MASKS = ("weight", "loss", "train")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def pair(system: str, question: str, answer: str) -> Turns:
    return Turns(system, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def conversation(row: Row, key: str, role_key: str, text_key: str) -> Turns:
    """The conversation under `key`: a list of {role, text}, or {role: list, text: list} as in `datasets`.

    Raises BadRow.
    """
    messages = [_turn(turn, role_key, text_key) for turn in _listed(row.get(key), key)]
    join_outputs(messages)
    system = text(row, "system", optional=True)
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    calls = any("tool_calls" in message for message in messages)
    # Turns at the end that have no answer teach nothing. They are
    # left out, as is an answer before any question.
    while messages and _awaits_answer(messages[-1]):
        messages.pop()
    _check_order(messages)
    began_with_answer = bool(messages) and messages[0]["role"] == "assistant"
    if began_with_answer:
        first = next(
            (index for index, message in enumerate(messages) if message["role"] == "user"), len(messages)
        )
        del messages[:first]
    if not messages:
        but = " after a user's turn" if began_with_answer else " except calls of tools" if calls else ""
        raise BadRow(Kind.NO_ANSWER, f"no assistant turn{but}")
    return Turns(system, messages, began_with_answer, offered_tools(row, calls=calls))


def _awaits_answer(message: Message) -> bool:
    """Whether a message needs an answer of the assistant: a question, a call, or an output."""
    return message["role"] in ("user", "tool") or "tool_calls" in message


def _check_order(messages: list[Message]) -> None:
    """Raises BadRow if the turns are out of order.

    join_outputs has already checked that outputs follow calls.
    """
    previous = None
    for message in messages:
        role = message["role"]
        if role == "system":
            raise BadRow(Kind.LATE_SYSTEM, "a turn after the first is the system's")
        if previous and role == previous["role"] != "tool":
            raise BadRow(Kind.SAME_ROLE, f"two turns of {role} follow each other")
        if previous and role == "user" and _awaits_answer(previous):
            before = "a tool's turn" if previous["role"] == "tool" else "a call of a tool"
            raise BadRow(Kind.TOOLS, f"a user's turn follows {before}, which the assistant has not answered")
        previous = message


def _listed(turns: Any, key: str) -> list[Row]:
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        if len({len(column) for column in turns.values()}) > 1:
            raise BadRow(Kind.NO_TURNS, f"{key} holds lists of different lengths")
        return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return turns
    raise BadRow(Kind.NO_TURNS, f"{key} is missing or not a list of turns")


def _turn(turn: Row, role_key: str, text_key: str) -> Message:
    role = turn.get(role_key)
    if isinstance(role, str) and role in OUTPUT_ROLES:
        return output_of(turn, text(turn, text_key))
    if isinstance(role, str) and role in CALL_ROLES:
        thought, calls = calls_in_text(text(turn, text_key), role)
        message: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        return message if thought is None else {**message, "reasoning_content": thought}
    try:
        role = _ROLES[role]  # type: ignore[index]
    except (KeyError, TypeError):  # missing, not known, or of a type that no key has
        known = ", ".join(_ROLES)
        reason = f"{role_key} of a turn is {quoted(role)}, but the known roles are {known} and those of tools"
        raise BadRow(Kind.UNKNOWN_ROLE, reason) from None
    has_more = len(turn) > 2 and role == "assistant"  # keys other than role and text
    calls = calls_of(turn) if has_more else []
    message = {"role": role, "content": text(turn, text_key, optional=bool(calls))}
    thought = next((turn[key] for key in _THOUGHTS if turn.get(key)), None) if has_more else None
    if thought is not None and split_thought(message["content"])[0] is None:  # else the text has it already
        message["reasoning_content"] = text({"reasoning": thought}, "reasoning")
    if calls:
        message["tool_calls"] = calls
    elif has_more and not _is_learned(turn):
        message["supervised"] = False
    return message


def _is_learned(turn: Row) -> bool:
    """Whether the mask keys of an assistant turn allow to learn it. null counts as no mask. Raises BadRow."""
    masks = {key: turn[key] for key in _MASKS if turn.get(key) is not None}
    for key, value in masks.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(
                Kind.BAD_MASK,
                f"{key} of a turn is {quoted(value)}, but must be 1 (learned) or 0 (not learned)",
            )
    if len(set(masks.values())) > 1:
        raise BadRow(Kind.BAD_MASK, f"{' and '.join(masks)} of a turn contradict each other")
    return all(masks.values())
