"""Every form of a row gives the same example, and a bad row is listed with its line and reason."""

from pathlib import Path

import pytest
from small_instructions import alpaca
from small_models import write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import read_rows

FORMS = {
    "alpaca": {"instruction": "Q", "input": "I", "output": "A", "system": "S"},
    "orca": {"system_prompt": "S", "question": "Q\n\nI", "response": "A"},
    "messages": {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q\n\nI"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "nobody answers this"},
        ]
    },
    "sharegpt": {
        "system": "S",
        "conversations": [{"from": "human", "value": "Q\n\nI"}, {"from": "gpt", "value": "A"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_example(tmp_path: Path, form: str) -> None:
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [FORMS[form]]))
    (example,) = rows.read()
    assert (rows.form, rows.bad) == (form, [])
    assert (example.system, example.response) == ("S", "A")
    assert example.prompt() == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\n\nI"}]
    explicit = read_rows(write_rows(tmp_path / "rows.jsonl", [FORMS[form] | {"id": 7}]), form)
    assert [e.id for e in explicit.read()] == ["7"]


def test_several_turns_and_default_system(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    (example,) = read_rows(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])).read()
    assert (example.messages, example.response, example.system) == (turns[:3], "d", None)
    assert example.prompt("be brief") == [{"role": "system", "content": "be brief"}, *turns[:3]]
    assert example.prompt() == turns[:3]


BAD_ROWS = {
    "no response": ({"instruction": "Q"}, "output is missing"),
    "empty response": ({"instruction": "Q", "output": " \n"}, "response is empty"),
    "empty prompt": ({"instruction": " ", "output": "A"}, "prompt is empty"),
    "response of a wrong type": ({"instruction": "Q", "output": {"a": "A"}}, "output is a dict"),
    "prompt of a wrong type": ({"instruction": 5, "output": "A"}, "instruction is a int"),
    "half a surrogate pair": ('{"instruction": "Q", "output": "\\ud800"}', "surrogate"),
    "half a surrogate pair as id": (
        '{"id": "\\ud800", "instruction": "Q", "output": "A"}',
        "id holds half a surrogate",
    ),
    "half a surrogate pair as category": (
        '{"category": "\\ud800", "instruction": "Q", "output": "A"}',
        "category holds half a surrogate",
    ),
    "id of a wrong type": ({"id": [1], "instruction": "Q", "output": "A"}, "id is"),
    "another form": ({"question": "Q", "response": "A"}, "instruction is missing"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_listed_with_line_and_reason(tmp_path: Path, kind: str) -> None:
    row, reason = BAD_ROWS[kind]
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [alpaca(1), "", row, alpaca(2)]))
    assert rows.lines == {"e1": 1, "e2": 4}
    assert [example.id for example in rows.read()] == ["e1", "e2"]
    assert [example.id for example in rows.read({"e2"})] == ["e2"]
    assert [bad["line"] for bad in rows.bad] == [3]  # the empty second line counts
    assert reason in rows.bad[0]["reason"]


@pytest.mark.parametrize(
    "roles, reason",
    [
        (["user", "user", "assistant"], "two turns of user follow each other"),
        (["user", "tool", "assistant"], "a tool's turn has no call before it"),
        (["user", ["assistant"]], "role of a turn is ['assistant']"),
        (["user"], "no assistant turn"),
        ([], "no assistant turn"),
    ],
)
def test_conversations_that_are_none(tmp_path: Path, roles: list[str], reason: str) -> None:
    good = FORMS["messages"]
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    (bad,) = read_rows(write_rows(tmp_path / "rows.jsonl", [good, row])).bad
    assert bad["line"] == 2 and reason in bad["reason"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([alpaca(1), '{"id": 5,'], "rows.jsonl:2: not valid JSON"),
        ([alpaca(1), "[1]"], "rows.jsonl:2: a row must be a JSON object"),
        ([{"prompt": "Q", "completion": "A"}], "no row has a known form.*completion, prompt"),
        ([], "no row has a known form"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(write_rows(tmp_path / "rows.jsonl", rows))
