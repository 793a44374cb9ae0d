"""Laws of rows with tools: the forms in which people have them become one, and what is malformed is listed
with its reason.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import write_rows

from megatron_fuse.instructions import Example, read_rows
from megatron_fuse.instructions.bad_rows import Kind

FUNCTION = {
    "name": "tip",
    "description": "A tip.",
    "parameters": {"type": "object", "properties": {"é": {"type": "number"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"bill": 50.5, "é": ["a", None, {"b": True}]}
TEXT = json.dumps(ARGUMENTS)


def read_one(path: Path, row: dict, **options: object) -> Example | dict:
    """The row's example, or its listing."""
    rows = read_rows(write_rows(path / "rows.jsonl", [row]), "auto", **options)
    return next(rows.read()) if len(rows) else rows.bad[0]


def openai(*messages: dict, **columns: Any) -> dict:
    return {"messages": list(messages), **columns}


def sharegpt(*turns: tuple[str, str], **columns: Any) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **columns}


def call(name: str = "tip", arguments: Any = TEXT, **more: Any) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def calls(*made: dict, **more: Any) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(made), **more}


def output(text: str = "9", **more: Any) -> dict:
    return {"role": "tool", "content": text, **more}


GLAIVE = [
    ("human", "Q"),
    ("function_call", json.dumps({"name": "tip", "arguments": ARGUMENTS})),
    ("observation", "9"),
    ("gpt", "A"),
]
SAME = {
    "arguments as an object": openai(USER, calls(call(arguments=ARGUMENTS)), output(), ANSWER, tools=[TOOL]),
    "a content of text": openai(USER, calls(call(), content=""), output(), ANSWER, tools=[TOOL]),
    "tools as text": openai(USER, calls(call()), output(), ANSWER, tools=json.dumps([TOOL])),
    "bare schemas": openai(USER, calls(call()), output(), ANSWER, tools=[FUNCTION]),
    "calls without a type": openai(USER, calls({"function": call()["function"]}), output(), ANSWER, tools=[TOOL]),
    "calls as text": openai(USER, calls() | {"tool_calls": json.dumps([call()])}, output(), ANSWER, tools=[TOOL]),
    "nulls of a table": openai(
        USER | {"tool_calls": None},
        calls(call(id=None)) | {"function_call": None, "name": None},
        output(name=None, tool_call_id=None, tool_calls=None),
        ANSWER | {"tool_calls": None, "function_call": None},
        tools=[TOOL],
    ),
    "OpenAI's older form": openai(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "tip", "arguments": TEXT}},
        {"role": "function", "name": "tip", "content": "9"},
        ANSWER,
        functions=[FUNCTION],
    ),
    "glaive": sharegpt(*GLAIVE, tools=json.dumps([FUNCTION])),
    "glaive, a list of calls": sharegpt(
        *GLAIVE[:1], ("function_call", json.dumps([{"name": "tip", "arguments": TEXT}])), *GLAIVE[2:], tools=[TOOL]
    ),
    "roles of others": sharegpt(
        *GLAIVE[:1], ("tool_call", GLAIVE[1][1]), ("tool_response", "9"), *GLAIVE[3:], tools=[FUNCTION]
    ),
    "an unanswered call behind it": openai(USER, calls(call()), output(), ANSWER, USER, calls(call()), output(), tools=[TOOL]),
    "an unanswered call at its end": openai(USER, calls(call()), output(), ANSWER, USER, calls(call()), tools=[TOOL]),
    "calls before the first question": openai(calls(call(id="x")), output(), ANSWER, USER, calls(call(id="call00000")), output(), ANSWER, tools=[TOOL]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_every_form_becomes_the_same_example(tmp_path: Path, name: str) -> None:
    example = read_one(tmp_path, SAME[name])
    assert isinstance(example, Example), example
    made = {"id": "call00000", "type": "function", "function": {"name": "tip", "arguments": ARGUMENTS}}
    assert example.messages == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "9", "name": "tip", "tool_call_id": "call00000"},
    ]
    assert (example.response, example.tools, example.uses_tools) == ("A", [TOOL], True)
    assert json.loads(json.dumps(example.as_row()))["tools"] == [TOOL]


def test_outputs_belong_to_calls_by_id_or_in_order(tmp_path: Path) -> None:
    made = [call("tip", id="one"), call("add", id="two")]
    swapped = read_one(
        tmp_path,
        openai(USER, calls(*made), output("2", tool_call_id="two"), output("1", tool_call_id="one"), ANSWER),
    )
    assert [(turn["name"], turn["content"]) for turn in swapped.messages[2:]] == [("add", "2"), ("tip", "1")]
    plain = [call("tip"), call("add"), call("tip")]
    row = openai(
        USER, calls(*plain[:2]), output("1"), output("2", name="sum"), calls(plain[2]), output("3"), ANSWER
    )
    example = read_one(tmp_path, row)
    ids = [each["id"] for turn in example.messages for each in turn.get("tool_calls", ())]
    assert ids == ["call00000", "call00001", "call00002"]
    outputs = [turn for turn in example.messages if turn["role"] == "tool"]
    assert [(turn["name"], turn["tool_call_id"]) for turn in outputs] == list(
        zip(["tip", "sum", "tip"], ids, strict=True)
    )


def test_text_and_thought_of_a_call_are_kept(tmp_path: Path) -> None:
    example = read_one(
        tmp_path, openai(USER, calls(call(), content="Let me see.", reasoning_content="hm"), output(), ANSWER)
    )
    assert (example.messages[1]["content"], example.messages[1]["reasoning_content"]) == ("Let me see.", "hm")
    turns = [*GLAIVE[:1], ("function_call", f"<think>hm</think>\n{GLAIVE[1][1]}"), *GLAIVE[2:]]
    assert read_one(tmp_path, sharegpt(*turns)).messages[1]["reasoning_content"] == "hm"


def test_the_id_of_a_row_depends_on_its_tools(tmp_path: Path) -> None:
    rows = [
        openai(USER, ANSWER),
        openai(USER, ANSWER, tools="[]"),
        openai(USER, ANSWER, tools=[TOOL]),
        openai(USER, ANSWER, functions=["x"]),
    ]
    first, empty, offered, older = (read_one(tmp_path, row) for row in rows)
    assert first == empty == older  # without a call the older key is ignored
    assert first.id != offered.id and first.tools is None


@pytest.mark.parametrize("every_turn", [False, True])
def test_calls_are_not_learned(tmp_path: Path, every_turn: bool) -> None:
    masked = ANSWER | {"weight": 0}
    row = openai(USER, ANSWER, USER, calls(call()), output(), masked)
    found = read_one(tmp_path, row, every_turn=every_turn)
    if every_turn:
        assert (found.messages, found.response) == ([USER], "A")
    else:
        assert (found["kind"], found["reason"]) == (Kind.MASKED, "the last assistant turn is masked")


DEEP: Any = []
for _ in range(70):
    DEEP = [DEEP]
LISTED = {
    "an output alone": (openai(USER, output(), ANSWER), "a tool's turn has no call before it"),
    "an output more": (openai(USER, calls(call()), output(), output(), ANSWER), "a tool's turn has no call "
                                                                                "before it"),
    "an output behind an answer": (openai(USER, ANSWER, output()), "a tool's turn has no call before it"),
    "a call written as text": (
        openai(USER, {"role": "assistant", "content": "<tool_call>"}, output(), ANSWER),
        "a tool's turn has no call before it",
    ),
    "another id": (
        openai(USER, calls(call(id="a")), output(tool_call_id="b"), ANSWER),
        "a tool's turn has no call of the id 'b' before it",
    ),
    "a question in between": (
        openai(USER, calls(call()), output(), USER, ANSWER),
        "a user's turn follows a tool's turn, which the assistant has not answered",
    ),
    "a question behind a call": (
        openai(USER, calls(call()), USER, ANSWER),
        "a user's turn follows a call of a tool, which the assistant has not answered",
    ),
    "arguments that are a list": (openai(USER, calls(call(arguments="[1]")), output(), ANSWER), "are [1], not a JSON object"),
    "arguments that are no JSON": (openai(USER, calls(call(arguments="{a: 1}")), output(), ANSWER), "is not JSON ("),
    "arguments that are a number": (openai(USER, calls(call(arguments=5)), output(), ANSWER), "are 5, not a "
                                                                                              "JSON object"),
    "no number": (openai(USER, calls(call(arguments='{"a": NaN}')), output(), ANSWER), "holds nan, which is "
                                                                                       "not a JSON value"),
    "half a surrogate pair": (openai(USER, calls(call(arguments='{"\\ud800": 1}')), output(), ANSWER), "half a surrogate pair"),
    "too deep": (openai(USER, calls(call(arguments={"a": DEEP})), output(), ANSWER), "nested in more than "
                                                                                     "64 levels"),
    "no name": (openai(USER, calls(call(name="")), output(), ANSWER), "a call has the name ''"),
    "an id that is a number": (openai(USER, calls(call(id=5)), output(), ANSWER), "id of a call is 5, not "
                                                                                  "text"),
    "a name that is a number": (openai(USER, calls(call()), output(name=5), ANSWER), "name of a turn is 5, "
                                                                                     "not text"),
    "a call that is text": (openai(USER, calls("tip"), output(), ANSWER), "a call is 'tip', not {name, ...}"),
    "calls that are an object": (openai(USER, calls() | {"tool_calls": call()}, output(), ANSWER), "not a list of calls"),
    "another type of call": (openai(USER, calls({"type": "custom", "custom": {"name": "x"}}), output(), ANSWER), "and not {type: function"),
    "an older call that is a list": (
        openai(USER, {"role": "assistant", "content": None, "function_call": [1]}, output(), ANSWER),
        "a call is [1], not {name, ...}",
    ),
    "a call of text that is none": (sharegpt(("human", "Q"), ("function_call", "tip(5)"), *GLAIVE[2:]), "is not JSON ("),
    "an empty call": (sharegpt(("human", "Q"), ("function_call", "[]"), *GLAIVE[2:]), "a turn of "
                                                                                      "function_call has no "
                                                                                      "call"),
    "tools that are no JSON": (openai(USER, ANSWER, tools="tip"), "tools: 'tip' is not JSON"),
    "tools that are an object": (openai(USER, ANSWER, tools=FUNCTION), "not a list of tools"),
    "a tool without a name": (openai(USER, ANSWER, tools=[{"type": "function", "function": {}}]), "has the name None"),
    "a tool of another type": (openai(USER, ANSWER, tools=[{"type": "web_search"}]), "a tool of tools is"),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_what_is_malformed_is_listed(tmp_path: Path, name: str) -> None:
    row, reason = LISTED[name]
    listed = read_one(tmp_path, row)
    assert isinstance(listed, dict), listed
    assert reason in listed["reason"]
    assert listed["kind"] == (Kind.NOT_TEXT if name == "half a surrogate pair" else Kind.TOOLS)


@pytest.mark.parametrize("turns", [[calls(call()), output()], [calls(call())]])
def test_a_row_without_an_answer_in_text_is_listed(tmp_path: Path, turns: list[dict]) -> None:
    listed = read_one(tmp_path, openai(USER, *turns))
    assert (listed["kind"], listed["reason"]) == (Kind.NO_ANSWER, "no assistant turn except calls of tools")
    assert (
        read_one(tmp_path, openai(USER, calls(call()), calls(call()), output(), ANSWER))["kind"]
        == Kind.SAME_ROLE
    )


@pytest.mark.parametrize("arguments", [None, "", " ", "{}", {}, "null"])
def test_a_call_without_arguments(tmp_path: Path, arguments: object) -> None:
    example = read_one(tmp_path, openai(USER, calls(call(arguments=arguments)), output(""), ANSWER))
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_parquet_rows_with_tools_are_read_as_those_of_json(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        openai(USER, calls(call()), output(), ANSWER, tools=json.dumps([TOOL])),
        openai(USER, ANSWER, tools=None),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found, plain = read_rows(tmp_path / "rows.parquet"), read_rows(write_rows(tmp_path / "rows.jsonl", rows))
    assert list(found.read()) == list(plain.read()) and found.bad == plain.bad and len(found) == 2
