"""What a row says, whatever its form: the system message and turns of user and assistant, checked."""

from typing import Any, NamedTuple

from megatron_fuse.chat.thoughts import split_thought
from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.instructions.examples import Message
from megatron_fuse.storage.records import quoted

Row = dict[str, Any]


class Turns(NamedTuple):
    """A conversation: user and assistant in turn, the assistant last; at least one of each."""

    system: str  # "": none
    turns: list[Message]
    began_with_answer: bool = False  # the assistant's turn before the first question was left off


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TOOL_ROLES = {
    *("tool", "tool_call", "tool_calls", "tool_response", "tool_result", "function", "function_call"),
    *("function_response", "function_result", "observation", "ipython"),
}
_MASKS = ("weight", "loss", "train")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_NO_TOOLS = (None, "", "[]", [])


def text(row: Row, key: str, *, optional: bool = False) -> str:
    """A text of a row or turn; of a list of text parts their whole. Optional: "" where there is none."""
    value = row.get(key)
    if isinstance(value, str):
        return characters(value, key)
    if value is None:
        if optional:
            return ""
        raise BadRow(Kind.MISSING, f"{key} is missing")
    if isinstance(value, list):
        return characters("".join(_part(part, key) for part in value), key)
    raise BadRow(Kind.NOT_TEXT, f"{key} is a {type(value).__name__}, not text")


def _part(part: Any, key: str) -> str:
    kind, words = (part.get("type"), part.get("text")) if isinstance(part, dict) else ("text", part)
    if kind == "text" and isinstance(words, str):
        return words
    raise BadRow(Kind.NOT_TEXT, f"{key} is a list with {quoted(part)}, which is no text part {{type: text, text}}")


def characters(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no character
        reason = f"{key} holds half a surrogate pair at character {error.start}"
        raise BadRow(Kind.BAD_ID if key == "id" else Kind.NOT_TEXT, reason) from error
    return value


def pair(system: str, question: str, answer: str) -> Turns:
    return Turns(system, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def conversation(row: Row, key: str, role_key: str, text_key: str) -> Turns:
    """The turns under `key`: a list of {role, text}, or {role: list, text: list} as `datasets` stores it."""
    if row.get("tools") not in _NO_TOOLS:
        raise BadRow(Kind.TOOLS, "tools are offered, which are not read")
    messages = [_turn(turn, role_key, text_key) for turn in _listed(row.get(key), key)]
    system = text(row, "system", optional=True)
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    while messages and messages[-1]["role"] == "user":  # a question without an answer
        messages.pop()
    previous = None
    for message in messages:
        role = message["role"]
        if role == "system":
            raise BadRow(Kind.LATE_SYSTEM, "a turn behind the first is the system's")
        if role == previous:
            raise BadRow(Kind.SAME_ROLE, f"user and assistant do not take turns: two of the {role} in a row")
        previous = role
    began_with_answer = bool(messages) and messages[0]["role"] == "assistant"
    if began_with_answer:
        del messages[0]
    if not messages:
        raise BadRow(Kind.NO_ANSWER, "no assistant turn" + (" behind a user's" if began_with_answer else ""))
    return Turns(system, messages, began_with_answer)


def _listed(turns: Any, key: str) -> list[Row]:
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        if len({len(column) for column in turns.values()}) > 1:
            raise BadRow(Kind.NO_TURNS, f"{key} holds lists of different lengths")
        return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return turns
    raise BadRow(Kind.NO_TURNS, f"{key} is missing or no list of turns")


def _turn(turn: Row, role_key: str, text_key: str) -> Message:
    try:
        role = _ROLES[turn[role_key]]
    except (KeyError, TypeError):  # missing, not known, or of a type that no key has
        raise _unknown_role(turn.get(role_key), role_key) from None
    has_more = len(turn) > 2 and role == "assistant"  # than role and text
    if has_more and (turn.get("tool_calls") or turn.get("function_call")):
        raise BadRow(Kind.TOOLS, "tool turns are not read (a turn calls a tool)")
    message: Message = {"role": role, "content": text(turn, text_key)}
    thought = next((turn[key] for key in _THOUGHTS if turn.get(key)), None) if has_more else None
    if thought is not None and split_thought(message["content"])[0] is None:  # else the text has it already
        message["reasoning_content"] = text({"reasoning": thought}, "reasoning")
    if has_more and not _is_learned(turn):
        message["supervised"] = False
    return message


def _unknown_role(name: Any, role_key: str) -> BadRow:
    if isinstance(name, str) and name in _TOOL_ROLES:
        return BadRow(Kind.TOOLS, f"tool turns are not read ({role_key} {quoted(name)})")
    return BadRow(Kind.UNKNOWN_ROLE, f"{role_key} of a turn is {quoted(name)}; known are {', '.join(_ROLES)}")


def _is_learned(turn: Row) -> bool:
    """What the mask keys of an assistant turn say; null says nothing."""
    masks = {key: turn[key] for key in _MASKS if turn.get(key) is not None}
    for key, value in masks.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(Kind.BAD_MASK, f"{key} of a turn is {quoted(value)}: a turn is learned (1) or not (0)")
    if len(set(masks.values())) > 1:
        raise BadRow(Kind.BAD_MASK, f"{' and '.join(masks)} of a turn contradict each other")
    return all(masks.values())
