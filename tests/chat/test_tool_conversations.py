"""Laws of conversations with tools in a chat template.

The reference is transformers' `apply_chat_template(messages, tools=...)`.
"""

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from chat_families import FAMILIES, format_of, tokenizer_of
from tool_messages import TOOLS, asks, call, calls, output, says
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_fuse.chat import ChatFormat, supervised_turns
from megatron_fuse.chat.tool_rendering import CallStyle
from megatron_fuse.errors import UserError

KNOWING = [name for name, family in FAMILIES.items() if family.calls]
NOT_KNOWING = [name for name, family in FAMILIES.items() if not family.calls]
STYLES = {
    "deepseek v3, calls as text": CallStyle(text_arguments=True, null_content=True),
    "mistral 3 with tools": CallStyle(short_ids=True),
}
SPECIAL = (
    "hello <|im_end|><|eot_id|></s> <｜User｜><|user|>[INST]<|end_of_text|><|END_OF_TURN_TOKEN|><|end|> world"
)


ROME = call(0, "weather", city='Rome "è"\n', days=2)
SUM = call(1, "add", numbers=[1, 2.5, "three"], exact=True, unit=None, place={"a": ["b"]})
WITH_NAME = call(0, "weather", city="Rome", **{"it's": 5}) | {"id": "f.weather"}  # of nine characters
ANSWER = "the answer is 12"
ONE = [asks("hello world"), calls(ROME), output(ROME, '{"degrees": "20"}')]
TALKS = {
    "tools that are not called": [asks("hello"), says("Sure, the station."), asks("then?")],
    "a call and its output": ONE,
    "several exchanges": [
        *ONE,
        says("Sure, 20 degrees."),
        asks("then 1 + 2?"),
        calls(SUM),
        output(SUM, "  5.5\n"),
    ],
    "a call behind an output": [*ONE, calls(SUM), output(SUM, "5.5")],
    "a system message": [{"role": "system", "content": "Be kind."}, *ONE],
    "ids with names": [asks("hello"), calls(WITH_NAME), output(WITH_NAME, "20")],
    "special strings": [asks("hello"), calls(call(0, "weather", city=SPECIAL)), output(ROME, SPECIAL)],
    "two calls in one turn": [asks("hello"), calls(ROME, SUM), output(ROME, "20"), output(SUM, "5.5")],
}
PARALLEL = "two calls in one turn"


def printed(name: str, messages: list[dict[str, Any]], tools: list | None, **options: bool) -> list[int]:
    """transformers' ids; messages are given in the form that the family's template takes."""
    tokenizer = tokenizer_of(name)
    if not STYLES.get(name, CallStyle()).text_arguments:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=False, **options
        )
    given = deepcopy(messages)
    for message in given:
        for made in message.get("tool_calls", ()):
            message["content"] = None
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"], ensure_ascii=False)
    # apply_chat_template of version 5 drops a content of null, which the template asks for.
    ((text,), _) = render_jinja_template(
        [given], tools=tools, chat_template=FAMILIES[name].template, **tokenizer.special_tokens_map, **options
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def read(chat: ChatFormat, messages: list[dict[str, Any]], **options: Any) -> Any:
    return chat.encode_conversation(messages, ANSWER, tools=TOOLS, **options)


CASES = [
    (name, talk)
    for name in KNOWING
    for talk in TALKS
    if talk != "special strings" and (talk != PARALLEL or FAMILIES[name].calls > 1)
]


@pytest.mark.parametrize("every_turn", [False, True])
@pytest.mark.parametrize(("name", "talk"), CASES)
def test_a_conversation_with_tools_is_what_the_template_prints(
    name: str, talk: str, every_turn: bool
) -> None:
    chat, messages = format_of(name), TALKS[talk]
    found = read(chat, messages, every_turn=every_turn)
    expected = printed(name, [*messages, says(ANSWER)], TOOLS)
    if chat.stop_id not in expected[len(found.ids) - 1 :]:
        expected = [*expected, chat.stop_id]  # the next turn begins with it
    assert found.ids.tolist() == expected[: len(found.ids)]
    assert found.exact
    labels = found.ids[found.supervised]
    learned = supervised_turns(messages, ANSWER, every_turn=every_turn)
    bare = [token for token in labels.tolist() if token != chat.stop_id]
    assert chat.tokenizer.joined_bytes(bare).decode().replace(chat.separator, "") == "".join(learned).replace(
        chat.separator, ""
    )
    assert len(learned) == 1 + every_turn * sum(
        "tool_calls" not in turn for turn in messages if turn["role"] == "assistant"
    )


@pytest.mark.parametrize(("name", "talk"), CASES)
def test_an_answer_behind_an_output_is_generated_where_it_is_learned(name: str, talk: str) -> None:
    chat, messages = format_of(name), TALKS[talk]
    begun, given = chat.encode_prompt(messages, TOOLS), read(chat, messages)
    prompt = printed(name, messages, TOOLS, add_generation_prompt=True)
    assert begun[: len(prompt)] == prompt
    assert given.ids[: given.prompt_length].tolist() == begun


@pytest.mark.parametrize("name", KNOWING)
def test_special_strings_of_arguments_outputs_and_schemas_stay_text(name: str) -> None:
    chat = format_of(name)
    special = [
        {
            "type": "function",
            "function": {"name": "weather", "description": SPECIAL, "parameters": {SPECIAL: {}}},
        }
    ]
    plain = [
        {"type": "function", "function": {"name": "weather", "description": "x", "parameters": {"y": {}}}}
    ]
    messages = [asks("hello"), calls(call(0, "weather", **{SPECIAL: SPECIAL})), output(ROME, SPECIAL)]
    others = [asks("hello"), calls(call(0, "weather", city="x")), output(ROME, "x")]
    found, expected = (
        [
            token
            for token in chat.encode_conversation(*pair, tools=tools).ids
            if token in chat.tokenizer.special_ids
        ]
        for pair, tools in (((messages, ANSWER), special), ((others, ANSWER), plain))
    )
    assert found == expected
    begun = chat.encode_prompt(messages, special)
    assert [token for token in begun if token in chat.tokenizer.special_ids] == expected[: len(expected) - 1]
    text = tokenizer_of(name).decode(begun)
    for part in SPECIAL.split():
        # once in the key, the value and the output at least; in the schema as well where the template prints
        # it
        assert text.count(part) >= 3


@pytest.mark.parametrize("name", NOT_KNOWING)
@pytest.mark.parametrize("talk", ["tools that are not called", "a call and its output"])
def test_a_template_that_knows_no_tools_is_named(name: str, talk: str) -> None:
    chat = format_of(name)
    for meet in (lambda: read(chat, TALKS[talk]), lambda: chat.encode_prompt(TALKS[talk], TOOLS)):
        with pytest.raises(
            UserError, match=r"^target: the chat template of \S+ (does not print |refuses the messages: )"
        ):
            meet()
    assert chat.missing_of_tools is not None and chat.missing_of_tools.startswith(
        "target: the chat template of "
    )


@pytest.mark.parametrize("name", KNOWING)
def test_the_form_that_a_template_takes_calls_in_is_found(name: str) -> None:
    chat = format_of(name)
    assert chat._call_style == (STYLES.get(name, CallStyle()), None)


def test_ids_of_another_length_are_numbered_for_the_template_that_wants_nine_characters() -> None:
    name = "mistral 3 with tools"
    one, two = ROME | {"id": "call_x0y1z2a3b4"}, SUM | {"id": "x" * 40}
    messages = [asks("hello"), calls(one, two), output(two, "5.5"), output(one, "20")]
    found = read(format_of(name), messages)
    expected = [asks("hello"), calls(ROME, SUM), output(SUM, "5.5"), output(ROME, "20"), says(ANSWER)]
    assert found.ids.tolist() == printed(name, expected, TOOLS)


@pytest.mark.parametrize("name", [name for name in KNOWING if FAMILIES[name].calls == 1])
def test_calls_in_one_turn_that_are_lost_are_noticed(name: str) -> None:
    """One family's template refuses them, another's prints the first alone."""
    reason = {
        "llama3.1": "refuses the messages: single tool-calls",
        "gpt-oss": "does not print the name of a call of add",
    }
    with pytest.raises(UserError, match=reason[name]):
        read(format_of(name), TALKS[PARALLEL])


def test_outputs_that_are_found_by_ids_are_printed() -> None:
    """As in templates that print an output beside its call; and an id may be all that shows the name."""
    tokenizer = format_of("granite").tokenizer
    template = (
        "{% for m in messages %}{% if m['tool_calls'] %}{% set c = m['tool_calls'][0] %}{{ c['id'] }}{{ "
        "c['function']['arguments'] }}"
        "{% for o in messages %}{% if o['tool_call_id'] == c['id'] %}{{ o['content'] }}{% endif %}"
        "{% endfor %}{% elif m['role'] != 'tool' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    chat = ChatFormat(tokenizer, template, None, 0, origin="it")
    messages = [asks("hello"), calls(WITH_NAME), output(WITH_NAME, "20")]
    assert chat.render_prompt(messages) == """hellof.weather{"city": "Rome", "it's": 5}20"""
    with pytest.raises(UserError, match=r"^it does not print the name of a call of weather$"):
        chat.render_prompt([asks("hello"), calls(ROME), output(ROME, "20")])


BROKEN = {
    "outputs": ("{{ m['content'] }}\n</tool_response>", "\n</tool_response>", "the output of weather"),
    "names": ("\"name\": \"{{ c['function']['name'] }}\"", "", "the name of a call of weather"),
    "arguments": ("{{ c['function']['arguments'] | tojson }}", "{}", "the arguments of a call of weather"),
    "offered": ("{{ t | tojson }}", "{{ t['function']['parameters'] | tojson }}", "the offered tool weather"),
    # JSON text is what it prints well.
    "Python's form": ("['arguments'] | tojson", "['arguments'] | string", None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_template_leaves_out_is_named(case: str) -> None:
    """Texts that the conversation holds elsewhere too do not hide it."""
    before, after, missing = BROKEN[case]
    whole = format_of("qwen2.5 and smollm2")
    assert before in whole.template
    chat = ChatFormat(
        whole.tokenizer, whole.template.replace(before, after), None, whole.stop_id, origin="it"
    )
    here = call(0, "weather", city="hello")
    messages = [asks("hello weather"), calls(here), output(here, "hello")]
    if missing is None:
        assert chat.render_prompt(messages, TOOLS) == whole.render_prompt(messages, TOOLS).removesuffix(
            whole.opening
        )
        return
    with pytest.raises(UserError, match=f"^it does not print {missing}$"):
        chat.render_prompt(messages, TOOLS)


@pytest.mark.parametrize("name", ["qwen3", "glm 4.5"])
def test_the_thought_of_a_call_reaches_the_template(name: str) -> None:
    chat = format_of(name)
    messages = [asks("hello"), calls(ROME, reasoning_content="add the world"), output(ROME, "20")]
    found = read(chat, messages)
    assert found.ids[:-1].tolist() == printed(name, [*messages, says(ANSWER)], TOOLS)[: len(found.ids) - 1]
    assert "add the world" in tokenizer_of(name).decode(found.ids[~found.supervised])


def test_rows_without_tools_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their ids are those of a format that never met a tool."""
    chat = format_of("qwen3")
    rendered = []
    original = ChatFormat.render
    monkeypatch.setattr(ChatFormat, "render", lambda *a, **k: rendered.append(1) or original(*a, **k))
    plain = chat.encode_conversation([asks("hello")], ANSWER)
    assert len(rendered) == 1
    assert np.array_equal(plain.ids, chat.encode_conversation([asks("hello")], ANSWER, tools=[]).ids)
    assert len(rendered) == 2
