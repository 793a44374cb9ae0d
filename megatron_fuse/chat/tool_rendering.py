"""Finds out in what form a chat template takes calls of tools, and whether it prints them.

It renders conversations with marks. Templates expect different forms of a call. In transformers' form the
arguments are an object. DeepSeek's older templates append the arguments to a text, and print calls only if
the turn's content is null. Mistral's templates take ids of nine characters. A template that does not support
tools leaves out parts of the conversation without an error.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_fuse.chat.nested_texts import with_texts
from megatron_fuse.errors import UserError

Turn = Mapping[str, Any]
Tools = list[dict[str, Any]]
Render = Callable[[Sequence[Turn], Tools | None], str]  # the text of a template for turns and offered tools

_MARK = "9d41c7e2"


@dataclass(frozen=True)
class CallStyle:
    """The form in which a template gets calls.

    text_arguments: arguments are JSON text, else an object. null_content: the content of a turn with calls
    and no text is null, else "". short_ids: ids that do not have nine characters become `call00000` and so
    on, else all ids stay.
    """

    text_arguments: bool = False
    null_content: bool = False
    short_ids: bool = False

    def shown(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The turns in this form."""
        ids = [call["id"] for turn in turns for call in turn.get("tool_calls", ())]
        numbered = {name: f"call{number:05d}" for number, name in enumerate(dict.fromkeys(ids))}
        short = {name: new for name, new in numbered.items() if self.short_ids and len(name) != len(new)}
        return [self._shown(dict(turn), short) for turn in turns]

    def _shown(self, turn: dict[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
        if "tool_call_id" in turn:
            turn["tool_call_id"] = short.get(turn["tool_call_id"], turn["tool_call_id"])
        if "tool_calls" in turn:
            turn["tool_calls"] = [self._call(call, short) for call in turn["tool_calls"]]
            turn["content"] = turn["content"] or (None if self.null_content else "")
        return turn

    def _call(self, call: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
        function = call["function"]
        if self.text_arguments:
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return {**call, "id": short.get(call["id"], call["id"]), "function": function}


STYLES = [CallStyle(*choice) for choice in product((False, True), repeat=3)]


def has_tools(turns: Sequence[Turn], tools: Tools | None) -> bool:
    return bool(tools) or any("tool_calls" in turn or turn["role"] == "tool" for turn in turns)


def not_printed(render: Render, turns: Sequence[Turn], tools: Tools | None) -> list[str]:
    """The offered tools, calls and outputs that a template leaves out, in words.

    render(turns, tools): its text.

    A mark is put after every name, every text and key of the arguments, and every output. Neither JSON nor
    stripped white space changes a mark, and no other text of the conversation contains it.
    """
    marks: dict[str, str] = {}  # mark -> what it marks
    ids: dict[str, str] = {}  # id of a call -> with a mark; templates compare these ids with those of outputs

    def marked(text: str, what: str) -> str:
        mark = f"{_MARK}{len(marks)}x"
        marks[mark] = what
        return text + mark

    def called(call: Mapping[str, Any]) -> dict[str, Any]:
        name, function = call["function"]["name"], call["function"]
        shown = marked(name, f"the name of a call of {name}")
        arguments = with_texts(
            function["arguments"], lambda text: marked(text, f"the arguments of a call of {name}")
        )
        # Kimi's templates print only the id of a call, which contains the name. So the id gets the mark too.
        ids[call["id"]] = call["id"].replace(name, shown)
        return {**call, "id": ids[call["id"]], "function": {"name": shown, "arguments": arguments}}

    offered = [
        {**tool, "function": {**tool["function"], "name": marked(name, f"the offered tool {name}")}}
        for tool in tools or ()
        for name in [tool["function"]["name"]]
    ]
    given = []
    for turn in turns:
        if "tool_calls" in turn:
            turn = {**turn, "tool_calls": [called(call) for call in turn["tool_calls"]]}
        elif turn["role"] == "tool":
            what = f"the output of {turn.get('name', 'a tool')}"
            content = marked(turn["content"], what) if turn["content"].strip() else turn["content"]
            turn = {**turn, "content": content, "tool_call_id": ids.get(turn.get("tool_call_id", ""), "")}
        given.append(turn)
    # A part whose mark is not in the text was not printed.
    text = render(given, offered or None)
    missing = [what for mark, what in marks.items() if mark not in text]
    every = [call["function"] for turn in given for call in turn.get("tool_calls", ())]
    missing += [
        "the arguments of a call as JSON" for function in every if _is_in_python(function["arguments"], text)
    ]
    return list(dict.fromkeys(missing))


def _is_in_python(arguments: dict[str, Any], text: str) -> bool:
    """Whether a text has the arguments in Python's form.

    A template prints this if it treats an object as text.
    """
    form = repr(arguments)
    return form in text and form != json.dumps(arguments, ensure_ascii=False)


def _in_style(render: Render, style: CallStyle) -> Render:
    return lambda turns, tools: render(style.shown(turns), tools)


def best_style(render: Render, origin: str) -> tuple[CallStyle, str | None]:
    """(the first style with the fewest missing parts of a call, the reason why parts are missing or None).

    render(turns, tools): the template's text; it raises UserError if the template refuses them. origin: the
    name of the template in errors.
    """
    reasons: list[tuple[int, CallStyle, str | None]] = []
    for style in STYLES:
        try:
            missing = not_printed(_in_style(render, style), _PROBE, _PROBE_TOOLS)
        except UserError as error:
            # An error is worse than any number of missing parts.
            reasons.append((len(_PROBE) * 100, style, str(error)))
            continue
        if not missing:
            return style, None
        reasons.append((len(missing), style, f"{origin} does not print {missing[0]}"))
    return min(reasons, key=lambda reason: reason[0])[1:]


_PROBE_ID = "call_x0y1z2a3b4"  # like an id of OpenAI: longer than nine characters
_PROBE: list[Turn] = [
    {"role": "user", "content": "How warm is it?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": _PROBE_ID,
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Rome"}},
            }
        ],
    },
    {"role": "tool", "content": "20 degrees", "name": "weather", "tool_call_id": _PROBE_ID},
]
_PROBE_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city."}},
                "required": ["city"],
            },
        },
    }
]
