"""Thoughts of reasoning models: kept apart from the answer, however they come."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_families import save_tokenizer
from local_server import Act, completion, scripted
from served_recipes import answers, number, recipe_for
from small_models import save_model, small_recipe

from megatron_fuse.capture.stage import conversation_of
from megatron_fuse.chat import load_chat_format
from megatron_fuse.chat.thoughts import split_thought, thought_end, without_empty_thought
from megatron_fuse.fusion_data.encoding import encode_documents
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import Example, load_examples, prepare_instructions
from megatron_fuse.responses import Response, answer_text
from megatron_fuse.responses.answers import Learned, learned_of, learned_of_example
from megatron_fuse.responses.sampled import make_sampling, read_response
from megatron_fuse.responses.stop_texts import StopTexts
from megatron_fuse.sources.generation import Answer
from megatron_fuse.stages import Context
from megatron_fuse.tokenization import load_tokenizer
from megatron_fuse.tokenization.spans import response_bytes

END = "</think>"


@pytest.mark.parametrize(
    ("text", "end", "opened", "expected"),
    [
        ("add\n</think>\n\n4", END, True, ("add", "4")),
        ("<think>\nadd</think>4", END, True, ("add", "4")),  # the model repeats the tag of its prompt
        ("<think>add</think> 4", None, False, ("add", "4")),
        ("[THINK]add[/THINK]4", None, False, ("add", "4")),
        ("add and add", END, True, ("add and add", "")),  # no end: all of it is thought
        ("half</think>\n\nParis", END, False, ("half", "Paris")),  # a server's parser left the end in
        # Text of a model that does not think.
        ("half</think>Paris", None, False, (None, "half</think>Paris")),
        ("<think> is a tag", None, False, (None, "<think> is a tag")),
        ("<p>a</p>b", None, False, (None, "<p>a</p>b")),
        ("  plain \n", END, False, (None, "  plain \n")),
        ("", END, True, ("", "")),
        ("a</think>b</think>c", END, True, ("a", "b</think>c")),
    ],
)
def test_a_thought_is_split_from_its_answer(
    text: str, end: str | None, opened: bool, expected: tuple
) -> None:
    assert split_thought(text, end, opened=opened) == expected


@pytest.mark.parametrize(
    ("context", "response", "expected"),
    [
        ("A:\n<think>\n\n</think>\n\n", "<think>\nadd</think>4", "A:\n"),
        ("A:<think></think>", "\n<think>add</think>4", "A:"),
        ("A:<think></think>", "4", "A:<think></think>"),
        ("A:<think></think>", "<think> is a tag", "A:<think></think>"),
        ("A:<think>x</think>", "<think>add</think>4", "A:<think>x</think>"),
        ("A:<p></p>", "<p>a</p>", "A:<p></p>"),
        ("A:[THINK][/THINK]", "[THINK]add[/THINK]4", "A:"),
    ],
)
def test_an_empty_thought_makes_room_for_one(context: str, response: str, expected: str) -> None:
    assert without_empty_thought(context, response) == expected


def test_a_sampled_answer_begins_behind_the_thought(tmp_path: Path) -> None:
    """The stop text inside the thought ends nothing; a thought alone is no answer."""
    chat = load_chat_format(load_tokenizer(save_tokenizer("deepseek r1 distillation", tmp_path)))
    assert thought_end(chat.generation) == END
    stops = StopTexts(["STOP"], chat)

    def answer(text: str, *, stopped: bool = True) -> Response | None:
        return read_response("e", chat, Answer(chat.tokenizer.encode_continuation(text), stopped), stops)

    tokens = len(chat.tokenizer.encode_continuation("Paris"))
    assert answer("so STOP it\n</think>\n\nParis") == Response(
        "e", "Paris", False, tokens, reasoning="so STOP it"
    )
    assert answer("so\n</think>\n\nParis STOP it") == Response(
        "e", "Paris ", False, tokens + 1, reasoning="so"
    )
    assert answer("so it goes on", stopped=False) == Response("e", "", True, 0, reasoning="so it goes on")
    assert answer("so it ends") is None and answer("so</think>\n") is None
    ids = chat.tokenizer.encode_continuation("a STOP b</think>c STOP d")
    complete = [count for count in range(1, len(ids) + 1) if stops.completed_by(ids[:count])]
    assert b"c STOP" in chat.tokenizer.joined_bytes(ids[: complete[0]])
    assert b"c STOP" not in chat.tokenizer.joined_bytes(ids[: complete[0] - 1])


def test_a_response_that_was_cut_within_its_thought_gets_no_empty_one(tmp_path: Path) -> None:
    """Nor is it an end of an answer: what is learned of it ends within the thought."""
    chat = load_chat_format(load_tokenizer(save_tokenizer("qwen3", tmp_path)))
    question = [{"role": "user", "content": "hello"}]
    text = chat.tokenizer.decode(
        chat.encode_conversation(question, "<think>\nso it goes", stop=False).ids.tolist()
    )
    assert text.endswith("assistant\n<think>\nso it goes") and "</think>" not in text
    assert split_thought("<think>\nso it", cut=True) == ("so it", "")
    cut = Response("e", "", True, 0, reasoning="so it goes")
    assert {learned_of(cut, option) for option in ("template", "drop", "supervise")} == {Learned("", False)}


def test_tags_that_are_special_tokens_are_sampled_and_found(tmp_path: Path) -> None:
    """They have no bytes, but a model that thinks writes them."""
    chat = load_chat_format(load_tokenizer(save_tokenizer("tags that are special tokens", tmp_path)))
    begin, end = (chat.tokenizer.added_tokens[tag] for tag in ("[THINK]", "[/THINK]"))
    assert set(chat.thought_tags) == {begin, end} <= chat.tokenizer.special_ids
    ids = [*chat.tokenizer.encode("so STOP"), end, *chat.tokenizer.encode(" \n Paris STOP it")]
    found = read_response("e", chat, Answer(ids, stopped=True), StopTexts(["STOP"], chat))
    assert (found.response, found.reasoning) == ("Paris ", "so STOP")
    assert chat.decode_response([*ids, chat.stop_id]) == "so STOP[/THINK] \n Paris STOP it"
    sampling = make_sampling(chat, StopTexts([], chat), temperature=1.0, top_p=1.0)
    assert sampling.allowed[[begin, end]].all()


def test_a_stop_text_is_not_sought_in_the_white_space_behind_a_thought(tmp_path: Path) -> None:
    chat = load_chat_format(load_tokenizer(save_tokenizer("deepseek r1 distillation", tmp_path)))
    stops = StopTexts(["\n\n"], chat)
    ids = chat.tokenizer.encode_continuation("so\n\nit\n</think>\n\nParis\n\nmore")
    complete = [count for count in range(1, len(ids) + 1) if stops.completed_by(ids[:count])]
    assert chat.tokenizer.joined_bytes(ids[: complete[0]]).endswith(b"Paris\n\n")
    found = read_response("e", chat, Answer(ids[: complete[0]], stopped=True), stops)
    assert (found.response, found.reasoning) == ("Paris", "so\n\nit")


def test_white_space_before_the_stop_token_is_no_part_of_a_sampled_answer(tmp_path: Path) -> None:
    chat = load_chat_format(load_tokenizer(save_tokenizer("nemotron nano v2", tmp_path)))
    ids = chat.tokenizer.encode_continuation("Paris\n")
    assert answer_text(chat, Answer(ids, stopped=True))[0] == "Paris"
    assert answer_text(chat, Answer(ids, stopped=False))[0] == "Paris\n"  # perhaps more lines were to come


def _said(content: str | None, **message: Any) -> Act:
    return completion(content, **message)


SERVED = {
    0: (_said("\n\nParis", reasoning_content="hm"), ("Paris", "hm")),
    1: (_said("half</think>\n\nParis", reasoning_content="hm"), ("Paris", "hm\nhalf")),
    2: (_said("<think>\nhm\n</think>\n\nParis"), ("Paris", "hm")),
    3: (_said("Paris", reasoning="hm"), ("Paris", "hm")),
    4: (_said("Paris", thinking="hm", reasoning_content=None), ("Paris", "hm")),
    5: (_said("", reasoning_content="hm"), None),
    6: (_said(None, reasoning_content="hm"), None),
    7: (_said(""), None),
    8: (_said("\n\n", reasoning_content="hm"), None),
    9: (_said("\n\nParis"), ("\n\nParis", None)),  # nothing says that the model thinks
    10: (_said("Paris", reasoning_content={"a": 1}), ("Paris", None)),
    11: (_said("a </think> b"), ("a </think> b", None)),
    12: (completion("<think>\nso it goes", "length"), ("", "so it goes")),
}


def test_what_a_server_says_beside_an_answer(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", seed=6)
    with scripted(lambda asked: SERVED[number(asked)][0]) as server:
        recipe = recipe_for(model, tmp_path, server.url, examples=len(SERVED))
        rows = answers(recipe)
    tokenizer = load_format(recipe.sources["served"], "served").tokenizer
    for place, (_, expected) in SERVED.items():
        text, thought = expected or ("", None)
        tokens = len(tokenizer.encode_continuation(text))
        assert rows[f"e{place}"] == Response(f"e{place}", text, place == 12, tokens, reasoning=thought)
    (unmatched,) = tmp_path.rglob("*.unmatched.txt")
    assert unmatched.read_text().split() == [
        f"e{place}" for place, (_, expected) in SERVED.items() if expected is None
    ]


ROWS = [
    {
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": "3", "reasoning_content": "one"},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4", "thinking": "two"},
        ]
    },
    {"messages": [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}]},
    {
        "messages": [
            {"role": "user", "content": "4 + 4?"},
            {"role": "assistant", "content": "<think>two</think>8", "reasoning": "two"},
        ]
    },
]


@pytest.mark.parametrize(
    ("option", "response", "thought", "earlier"),
    [
        ("template", "4", "two", {"content": "3", "reasoning_content": "one"}),
        ("drop", "4", None, {"content": "3"}),
        ("supervise", "<think>\ntwo\n</think>\n\n4", None, {"content": "<think>\none\n</think>\n\n3"}),
    ],
)
def test_thoughts_in_the_data(
    option: str, response: str, thought: str | None, earlier: dict, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", "llama", seed=6)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"reasoning": option, "validation_samples": 0}
    recipe = small_recipe(
        tmp_path / "run", path, model, {"a": {"model": str(model), "dtype": "fp32"}}, data=options
    )
    examples = load_examples(prepare_instructions(Context(recipe)))
    by_answer = {example.response: example for example in examples}
    assert by_answer.keys() == {response, "6", "<think>two</think>8"} and by_answer["6"].reasoning is None
    assert by_answer["<think>two</think>8"].reasoning is None  # the text has it already
    found = by_answer[response]
    assert found.reasoning == thought
    assert found.messages[1] == {"role": "assistant", **earlier}
    answer = Response("x", "4", False, 1, reasoning="two")
    assert learned_of(answer, option) == learned_of_example(found) == Learned(response, True, thought)


@pytest.mark.parametrize("option", ["template", "drop", "supervise"])
def test_source_and_target_learn_the_same_bytes_of_an_answer_with_a_thought(
    option: str, tmp_path: Path
) -> None:
    """The source's own answer as it is captured, and as the target's document: the thought is label,
    context or nowhere in both.
    """
    source, target = (
        load_chat_format(load_tokenizer(save_tokenizer(name, tmp_path / name)), learns=name == "qwen3")
        for name in ("nemotron 3", "qwen3")
    )
    example = Example("e", None, [{"role": "user", "content": "hello"}], "truth")
    learned = learned_of(Response("e", "Paris", False, 1, reasoning="so it is"), option)
    read = conversation_of(source, example, learned, every_turn=False).encoded
    documents = encode_documents(target, [example], [learned], every_turn=False, seq_length=500)
    data = response_bytes([learned.text])
    assert read is not None and read.exact and not documents.lossy[0]
    assert read.spans.ends[-1] == documents.spans[0].ends[-1] == len(data)
    for chat, ids, supervised in (
        (source, read.ids, read.supervised),
        (target, documents.tokens[0], documents.supervised[0].astype(bool)),
    ):
        labels, context = (chat.tokenizer.decode(ids[mask].tolist()) for mask in (supervised, ~supervised))
        assert labels == learned.text
        assert ("so it is" in labels, "so it is" in context) == (option == "supervise", option == "template")
        assert (labels + context).count("</think>") == 1
