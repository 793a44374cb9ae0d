"""Laws of chat formats over the families in use.

The reference is transformers' `apply_chat_template` on whole conversations.
"""

import numpy as np
import pytest
from chat_families import FAMILIES, format_of, tokenizer_of

from megatron_fuse.tokenization.spans import SpanFlag

SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [
    {"role": "user", "content": "hello world 12"},
    {"role": "assistant", "content": "Sure, the station."},
    {"role": "user", "content": "then?"},
]
ANSWER = "the answer is 12"
THINKERS = {
    "qwen3": "<think>\nadd\n</think>\n\n4",
    "glm 4.5": "<think>add</think>\n4",
    "nemotron 3": "<think>\nadd\n</think>\n4",
}


def printed(name: str, messages: list[dict[str, str]], **options: bool) -> list[int]:
    """transformers' ids of what its template prints."""
    return tokenizer_of(name).apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def folded(name: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The system message where the family takes it: in front of the first question, if its template
    refuses it.
    """
    if "no system" not in FAMILIES[name].template:
        return [SYSTEM, *messages]
    first = {"role": "user", "content": f"{SYSTEM['content']}\n\n{messages[0]['content']}"}
    return [first, *messages[1:]]


@pytest.mark.parametrize("every_turn", [False, True])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_finished_conversation_is_what_the_template_prints(
    name: str, system: bool, every_turn: bool
) -> None:
    """Ids up to the stop token, and no other token a label than those of the answers and their ends."""
    chat, tokenizer = format_of(name), tokenizer_of(name)
    messages = folded(name, TALK) if system else TALK
    found = chat.encode_conversation([SYSTEM, *TALK] if system else TALK, ANSWER, every_turn=every_turn)
    expected = printed(name, [*messages, {"role": "assistant", "content": ANSWER}])
    printed_stop = tokenizer.convert_tokens_to_ids(FAMILIES[name].stop)
    if printed_stop not in expected[len(found.ids) - 1 :]:
        expected = [*expected, printed_stop]  # the next turn begins with it
    assert found.ids.tolist() == expected[: len(found.ids)]
    text = tokenizer.decode(found.ids[found.supervised])
    answers = [TALK[1]["content"], ANSWER] if every_turn else [ANSWER]
    for answer in answers:
        assert answer in text
    assert found.ids[-1] == printed_stop == chat.stop_id
    assert found.exact and found.spans.has(SpanFlag.STOP)[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_begins_where_the_template_begins_it(name: str) -> None:
    family, chat = FAMILIES[name], format_of(name)
    prompt = printed(name, TALK, add_generation_prompt=True)
    begun = chat.encode_prompt(TALK)
    assert begun[: len(prompt)] == prompt
    assert tokenizer_of(name).decode(begun[len(prompt) :]) == ("" if family.generation else family.opening)
    assert (chat.generation, chat.opening) == (family.generation, family.opening)
    assert (chat.separator, chat.closing) == (family.separator, family.closing)
    given = chat.encode_conversation(TALK, ANSWER)
    context = given.ids[: given.prompt_length].tolist()
    assert (context == begun) == (not family.generation)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_end_that_the_model_has_ends_an_answer(name: str) -> None:
    family, chat, tokenizer = FAMILIES[name], format_of(name), tokenizer_of(name)
    assert tokenizer.convert_ids_to_tokens(chat.stop_id) == family.stop
    assert set(tokenizer.convert_ids_to_tokens(sorted(chat.end_ids))) == {
        family.stop,
        family.tokens[0],
        *family.listed,
    }
    ids = chat.encode_conversation(TALK, ANSWER).ids.tolist()
    answer = chat.tokenizer.encode_continuation(ANSWER)
    for end in chat.end_ids:
        assert chat.decode_response([*answer, end, *ids]) == ANSWER


@pytest.mark.parametrize("name", THINKERS)
def test_an_answer_with_a_thought_gets_no_second_one(name: str) -> None:
    response = THINKERS[name]
    chat = format_of(name)
    found = chat.encode_conversation(TALK, response)
    expected = printed(name, [*TALK, {"role": "assistant", "content": response}])
    assert found.ids.tolist()[: len(expected)] == expected[: len(found.ids)]
    text = tokenizer_of(name).decode(found.ids).rpartition(TALK[-1]["content"])[2]
    assert text.count("<think>") == text.count("</think>") == 1
    learned = tokenizer_of(name).decode(found.ids[found.supervised])
    assert learned.removesuffix(FAMILIES[name].stop).lstrip("\n") == response
    plain = chat.encode_conversation(TALK, "4")
    assert "</think>" in tokenizer_of(name).decode(plain.ids[~plain.supervised])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_thought_is_context_where_the_template_prints_it(name: str) -> None:
    chat, tokenizer = format_of(name), tokenizer_of(name)
    thought = "hello <|im_end|> world" if name != "qwen3" else "hello world"
    found = chat.encode_conversation(TALK, ANSWER, reasoning=thought)
    said = {"role": "assistant", "content": ANSWER, "reasoning_content": "hello world"}
    expected = printed(name, [*TALK, said])
    plain = chat.encode_conversation(TALK, ANSWER)
    assert found.ids[found.supervised].tolist() == plain.ids[plain.supervised].tolist()
    if thought == "hello world":
        assert found.ids[:-1].tolist() == expected[: len(found.ids) - 1]
    text = tokenizer.decode(found.ids[~found.supervised])
    assert (thought in text) == (name in ("qwen3", "qwen3 thinking", "nemotron 3", "glm 4.5"))
    ends = [token for token in found.ids if token in chat.tokenizer.special_ids]
    # The thought's <|im_end|> is text.
    assert ends == [token for token in plain.ids if token in chat.tokenizer.special_ids]


def test_white_space_before_the_stop_token_is_context_to_a_source_and_left_out_for_a_learner() -> None:
    source, target = (format_of("nemotron nano v2", learns=learns) for learns in (False, True))
    assert (source.closing, target.closing) == ("\n", "")
    read, learned = (chat.encode_conversation(TALK, ANSWER) for chat in (source, target))
    assert read.ids.tolist() == [*learned.ids[:-1], *source.tokenizer.encode("\n"), learned.ids[-1]]
    assert np.array_equal(read.ids[read.supervised], learned.ids[learned.supervised])
    assert source.sha256 != target.sha256
