"""Reads the tools of a row in one form: the offered tools, the assistant's calls and their outputs.

offered    [{type: function, function: {name, description, parameters, ...}}]
a call     {id, type: function, function: {name, arguments: object}}, in `tool_calls` of an assistant's turn
output     {role: tool, content, name, tool_call_id}: a turn; one or more follow the turn with the calls
"""

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

from megatron_fuse.chat.thoughts import split_thought
from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.instructions.examples import Message, ToolCall
from megatron_fuse.instructions.row_texts import Row, characters
from megatron_fuse.storage.records import quoted
from megatron_fuse.text_safety import brief

# Turns whose text is JSON: a call, or a list of them.
CALL_ROLES = {"function_call", "tool_call", "tool_calls"}
OUTPUT_ROLES = {
    *("tool", "function", "observation", "ipython"),
    *("tool_response", "tool_result", "function_response", "function_result"),
}
_DEEPEST = 64  # levels of lists and objects


def offered_tools(row: Row, *, calls: bool) -> list[dict[str, Any]] | None:
    """The tools that a row offers, None if there are none. Raises BadRow.

    They are under `tools`, or, if the row has calls, under OpenAI's older `functions`. The value is a list of
    schemas, or its JSON text.
    """
    key = "functions" if calls and row.get("tools") in (None, "", "[]", []) else "tools"
    listed = _from_text(row.get(key), key)
    if listed in (None, []):
        return None
    if not isinstance(listed, list):
        raise _bad(f"{key} is {quoted(listed)}, not a list of tools")
    return [{"type": "function", "function": _schema(entry, key)} for entry in listed]


def _schema(entry: Any, key: str) -> dict[str, Any]:
    """The schema {name, ...} of a tool, which is the schema or {type: function, function: {name, ...}}."""
    schema = _function(entry, f"a tool of {key}")
    _require_name(schema, f"a tool of {key}")
    return _json(schema, f"a tool of {key}")


def _function(entry: Any, what: str) -> dict[str, Any]:
    if isinstance(entry, dict) and entry.get("type") in (None, "function"):
        inner = entry.get("function")
        if isinstance(inner, dict):
            return inner
        if inner is None:
            return {key: value for key, value in entry.items() if key not in ("type", "function", "id")}
    raise _bad(
        f"{what} is {quoted(entry)}, not {{name, ...}} and not {{type: function, function: {{name, ...}}}}"
    )


def _require_name(function: dict[str, Any], what: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _bad(f"{what} has the name {quoted(name)}, but a name must be text")
    return characters(name, "name")


def calls_of(turn: Mapping[str, Any]) -> list[ToolCall]:
    """The calls of an assistant's turn. A call without an id gets the id "". Raises BadRow.

    They are under `tool_calls`. OpenAI's older `function_call` is a single call.
    """
    calls = _from_text(turn.get("tool_calls"), "tool_calls") or []
    if not isinstance(calls, list):
        raise _bad(f"tool_calls is {quoted(calls)}, not a list of calls")
    if not calls and turn.get("function_call"):
        calls = [_from_text(turn["function_call"], "function_call")]
    return [_call(call) for call in calls]


def calls_in_text(said: str, role: str) -> tuple[str | None, list[ToolCall]]:
    """(the thought before the calls or None, the calls) of a turn whose text is JSON. Raises BadRow."""
    thought, said = split_thought(said)
    calls = _from_text(said, f"the text of a turn of {role}")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise _bad(f"a turn of {role} has no call")
    return thought, [_call(call) for call in calls]


def _call(entry: Any) -> ToolCall:
    function = _function(entry, "a call")
    name = _require_name(function, "a call")
    arguments = _from_text(function.get("arguments"), f"arguments of a call of {quoted(name)}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise _bad(f"arguments of a call of {quoted(name)} are {quoted(arguments)}, not a JSON object")
    call_id = entry.get("id") or ""
    if not isinstance(call_id, str):
        raise _bad(f"id of a call is {quoted(call_id)}, not text")
    arguments = _json(arguments, f"arguments of a call of {quoted(name)}")
    return {
        "id": characters(call_id, "id of a call"),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def output_of(turn: Row, content: str) -> Message:
    """A tool's turn as it is in the row: name and tool_call_id may be missing. Raises BadRow."""
    message: Message = {"role": "tool", "content": content}
    for key in ("name", "tool_call_id"):
        if turn.get(key):
            if not isinstance(turn[key], str):
                raise _bad(f"{key} of a turn is {quoted(turn[key])}, not text")
            message[key] = characters(turn[key], key)
    return message


def join_outputs(messages: list[Message]) -> None:
    """Gives an id to every call without one, and to every output the id and the name of its call.

    An output belongs to the call that it names by tool_call_id, else to the first call without an output.
    Raises BadRow for an output without a call.
    """
    calls, waiting, have_ids = 0, list[ToolCall](), False
    for message in messages:
        if message["role"] != "tool":
            waiting = list(message.get("tool_calls", ()))
            have_ids = any(call["id"] for call in waiting)
            for number, call in enumerate(waiting, calls):
                call["id"] = call["id"] or f"call{number:05d}"
            calls += len(waiting)
            continue
        wanted = message.get("tool_call_id") if have_ids else None
        answered = next((call for call in waiting if wanted in (None, call["id"])), None)
        if answered is None:
            named = f" of the id {quoted(wanted)}" if wanted else ""
            raise _bad(f"a tool's turn has no call{named} before it")
        waiting.remove(answered)
        message["tool_call_id"] = answered["id"]
        message.setdefault("name", answered["function"]["name"])


def _from_text(value: Any, what: str) -> Any:
    """The value of JSON text; None for an empty text; any other value as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{what}: {quoted(value)} is not JSON ({brief(str(error), 80)})") from error


def _json(value: Any, what: str, depth: int = 0) -> Any:
    """The value, after a check that JSON can hold it and every stage can write it. Raises BadRow."""
    if depth > _DEEPEST:
        raise _bad(f"{what} is nested in more than {_DEEPEST} levels")
    if isinstance(value, str):
        return characters(value, what)
    if isinstance(value, list):
        return [_json(member, what, depth + 1) for member in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {characters(key, what): _json(member, what, depth + 1) for key, member in value.items()}
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return value
    raise _bad(f"{what} holds {quoted(value)}, which is not a JSON value")


def _bad(reason: str) -> BadRow:
    return BadRow(Kind.TOOLS, reason)
