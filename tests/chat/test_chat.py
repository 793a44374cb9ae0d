"""Laws of chat formats: the bytes of the response tokens are the response, whatever the template and the
tokenizer.
"""

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, REAL, byte_level, llama_json, make_tokenizer

from megatron_fuse.chat import ChatFormat, load_chat_format, supervised_turns
from megatron_fuse.chat.templates import TEMPLATES
from megatron_fuse.errors import UserError
from megatron_fuse.tokenization import Tokenizer, load_tokenizer
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans, response_bytes

quick = settings(max_examples=40, deadline=None, database=None)
# Of a law over every kind of tokenizer and every template, 35 of them.
few_and_many = pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.slow)])
USER = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
]
FRAGMENTS = [
    " ",
    "  ",
    "\n",
    "12",
    "Sure",
    "▁",
    "😀",
    "e\u0301",
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "{{ x }}",
    "\x00",
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=6).map("".join)


@cache
def small(kind: str) -> Tokenizer:
    return load_tokenizer(make_tokenizer(kind, Path(mkdtemp())))


@cache
def chat_format(kind: str, template: str) -> ChatFormat:
    return load_chat_format(small(kind), template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("vicuna_v1.1", "Be kind. USER: Hi ASSISTANT: Hello</s>USER: Who? ASSISTANT:"),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Who? [/INST]",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe "
            "kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "alpaca",
            "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nWho?\n\n### "
            "Response:\n",
        ),
        (
            "starling_rm",
            "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi </s> [/INST] Hello</s>[INST] Who? </s> [/INST]",
        ),
        ("eurus_rm", "[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Who? [/INST]"),
    ],
)
def test_built_in_templates_as_their_models_know_them(template, expected):
    assert load_chat_format(small("llama_json"), template).render_prompt(TALK) == expected


def test_default_system_messages():
    tokenizer = small("llama_json")
    vicuna = load_chat_format(tokenizer, "vicuna_v1.1").render_prompt(USER)
    assert vicuna.startswith("A chat between a curious user") and vicuna.endswith(
        "user's questions. USER: Hi ASSISTANT:"
    )
    own = load_chat_format(tokenizer, "vicuna_v1.1", system="Be brief.")
    assert own.render_prompt(USER) == "Be brief. USER: Hi ASSISTANT:"
    assert own.render_prompt(TALK).startswith("Be kind. USER:")  # an example's own system message stands
    assert load_chat_format(tokenizer, "vicuna_v1.1", system="").render_prompt(USER) == "USER: Hi ASSISTANT:"
    assert load_chat_format(tokenizer, "llama2").render_prompt(USER) == "<s>[INST] Hi [/INST]"


def assert_spans_lie_in(spans: TokenSpans, data: bytes, tokenizer: Tokenizer) -> None:
    """Spans partition the bytes that they claim, each token ends in its own, and stop tokens cover the
    ends of turns.
    """
    position = 0
    for token, start, end, flags in zip(spans.tokens, spans.starts, spans.ends, spans.flags, strict=True):
        if position < start:  # a turn whose stop token the template does not print
            assert data[position:start] == b"\0"
        assert position <= start <= end
        position = end
        if flags & SpanFlag.STOP:
            assert data[start:end] == b"\0"
        elif not flags & SpanFlag.LOSSY:
            assert tokenizer.token_bytes[token].endswith(data[start:end])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@few_and_many
def test_response_tokens_spell_the_response(kind, template, examples):
    form = chat_format(kind, template)
    tokenizer = form.tokenizer

    @settings(quick, max_examples=examples)
    @given(TEXTS, TEXTS, st.booleans())
    def law(question, response, stop):
        messages = [{"role": "user", "content": question}]
        encoded = form.encode_conversation(messages, response, stop=stop)
        spans, data = encoded.spans, response_bytes([response])
        assert encoded.ids.dtype == np.int32 and encoded.exact
        prompt = form.encode_prompt(messages)
        assert encoded.ids[: len(prompt)].tolist() == prompt and not encoded.supervised[: len(prompt)].any()
        behind = encoded.ids[len(prompt) :]
        unlearned = len(behind) - len(spans)  # the template's white space before the stop token
        assert encoded.supervised[len(prompt) : len(encoded.ids) - unlearned - stop].all()
        assert (
            tokenizer.joined_bytes(behind[-1 - unlearned : -1]) == form.closing.encode() * stop
            or not unlearned
        )
        assert bool(unlearned) == bool(form.closing and stop)
        assert encoded.ids[encoded.supervised].tolist() == spans.tokens.tolist()
        assert spans.has(SpanFlag.STOP).tolist() == [False] * (len(spans) - stop) + [True] * stop
        assert_spans_lie_in(spans, data, tokenizer)
        answer = spans.tokens[: len(spans) - stop]
        assert not tokenizer.special_ids & set(answer.tolist())
        assert not stop or spans.tokens[-1] == form.stop_id
        # clipped pieces joined are the response, byte for byte
        space = form.separator.encode() if response else b""
        assert tokenizer.joined_bytes(answer) == space + response.encode()
        assert not len(answer) or spans.ends[len(answer) - 1] == len(data) - 1
        assert spans.has(SpanFlag.LEADING).tolist() == [bool(space) and row == 0 for row in range(len(spans))]
        if stop or not form.closing:
            assert form.decode_response([*behind, form.stop_id, 5]) == response

    law()


TURNS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@few_and_many
def test_every_turn_is_supervised_with_its_stop_token(kind, template, examples):
    form = chat_format(kind, template)

    @settings(quick, max_examples=examples)
    @given(
        st.lists(st.tuples(TURNS, TEXTS.filter(bool)), min_size=1, max_size=3), TURNS, TEXTS, st.booleans()
    )
    def law(pairs, question, response, stop):
        talk = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        messages = [*talk, {"role": "user", "content": question}]
        encoded = form.encode_conversation(messages, response, stop=stop, every_turn=True)
        turns = supervised_turns(messages, response, every_turn=True)
        assert turns == [*(answer for _, answer in pairs), response]
        data, spans = response_bytes(turns), encoded.spans
        assert encoded.ids[encoded.supervised].tolist() == spans.tokens.tolist()
        assert_spans_lie_in(spans, data, form.tokenizer)
        # Every byte of every turn is some row's.
        covered = np.zeros(len(data), bool)
        for start, end in zip(spans.starts, spans.ends, strict=True):
            covered[start:end] = True
        ends = np.cumsum([len(turn.encode()) + 1 for turn in turns]) - 1
        assert covered[np.setdiff1d(np.arange(len(data)), ends)].all()
        stops = covered[ends[:-1]]
        # A template's end of turn may be plain text to a tokenizer, so that an earlier turn ends without a
        # token of its own.
        end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template)
        plain = end is not None and end not in form.tokenizer.added_tokens
        assert stops.all() if not plain else not stops.any()
        assert covered[ends[-1]] == stop
        # The last turn alone gives its rows; and the same ids, unless context may have its normal form or run
        # into a turn.
        last = form.encode_conversation(messages, response, stop=stop)
        count = len(last.spans)
        assert spans.tokens[len(spans) - count :].tolist() == last.spans.tokens.tolist()
        assert (spans.starts[len(spans) - count :] - ends[-2] - 1).tolist() == last.spans.starts.tolist()
        if (
            stops.all()
            and not form.closing
            and not any(not turn.isascii() or turn != turn.strip() for turn in turns)
        ):
            assert encoded.ids.tolist() == last.ids.tolist()

    law()


def test_a_supervised_turn_does_not_go_through_the_template(tmp_path):
    """Llama 3's template strips messages; a model's own words are what it said."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] | trim }} A:{% else %}"
        " {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    form = custom(tmp_path, template)
    talk = [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": " yes \n"},
        {"role": "user", "content": "So?"},
    ]
    encoded = form.encode_conversation(talk, " no", every_turn=True)
    text = form.tokenizer.decode(encoded.ids.tolist())
    assert encoded.exact and "Q: Hi A:  yes \n" in text and text.endswith("A:  no")


def test_a_template_without_the_earlier_turns_is_refused(tmp_path):
    form = custom(
        tmp_path,
        "Q: {{ messages[-1]['content'] if add_generation_prompt else messages[0]['content'] }} A:"
        "{% if messages[-1]['role'] == 'assistant' %}{{ messages[-1]['content'] + eos_token }}{% endif %}",
    )
    with pytest.raises(
        UserError, match=r"prints 0 of the 1 earlier assistant turns\. .* data.supervise to last_turn"
    ):
        form.encode_conversation(TALK, "x", every_turn=True)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_special_strings_in_messages_stay_text(kind, template):
    form = chat_format(kind, template)
    tokenizer = form.tokenizer
    count = sum(token in tokenizer.special_ids for token in form.encode_prompt(USER))
    for text in [text for text, token in tokenizer.added_tokens.items() if token in tokenizer.special_ids]:
        for content in (text, f"a{text} b", text + text):
            ids = form.encode_prompt([{"role": "user", "content": content}])
            assert sum(token in tokenizer.special_ids for token in ids) == count, content
            assert content in tokenizer.decode(ids)


@pytest.mark.parametrize("template", [*TEMPLATES, "{{ bos_token }}" + TEMPLATES["chatml"]])
@pytest.mark.parametrize("kind", KINDS)
def test_bos_exactly_once_if_there_is_one(kind, template, tmp_path):
    if template not in TEMPLATES:
        (tmp_path / "bos.jinja").write_text(template)
        template = str(tmp_path / "bos.jinja")
    tokenizer = small(kind)
    form = load_chat_format(tokenizer, template)
    for messages in (USER, [{"role": "user", "content": "</s><s>x"}]):
        ids = form.encode_prompt(messages)
        assert ids.count(tokenizer.bos_id) == tokenizer.adds_bos
        assert not tokenizer.adds_bos or ids[0] == tokenizer.bos_id


def test_ids_are_those_of_apply_chat_template(tmp_path):
    """A template that writes its own special tokens gives what transformers gives, prompt and answer."""
    hf = byte_level()
    form = load_chat_format(load_tokenizer(make_tokenizer("byte_level", tmp_path)))
    prompt = hf.apply_chat_template(TALK, add_generation_prompt=True).input_ids
    assert form.encode_prompt(TALK) == prompt
    whole = hf.apply_chat_template([*TALK, {"role": "assistant", "content": "The station. 12"}]).input_ids
    encoded = form.encode_conversation(TALK, "The station. 12")
    assert encoded.ids.tolist() == whole[: len(encoded.ids)]
    assert hf.convert_ids_to_tokens(form.stop_id) == "<|im_end|>"


def test_first_token_begins_in_the_white_space():
    """After `ASSISTANT:` Llama's first token is `▁the`: clipped, its end counts from the response's first
    byte.
    """
    form = chat_format("llama_json", "vicuna_v1.1")
    encoded = form.encode_conversation(USER, "the station")
    first = form.tokenizer.token_bytes[encoded.ids[encoded.prompt_length]]
    assert first.startswith(b" ") and len(first) > 1
    assert encoded.spans.ends[0] == len(first) - 1
    assert encoded.spans.has(SpanFlag.LEADING).tolist() == [True] + [False] * (len(encoded.spans) - 1)


def test_a_lone_space_before_a_digit_has_no_length():
    form = chat_format("sentencepiece", "vicuna_v1.1")
    encoded = form.encode_conversation(USER, "12")
    assert encoded.spans.starts.tolist() == [0, 0, 1, 2] and encoded.spans.ends.tolist() == [0, 1, 2, 3]


def test_empty_response():
    for kind in KINDS:
        encoded = chat_format(kind, "vicuna_v1.1").encode_conversation(USER, "")
        assert encoded.spans.tokens.tolist() == [chat_format(kind, "vicuna_v1.1").stop_id] and encoded.exact
        assert (encoded.spans.starts.tolist(), encoded.spans.ends.tolist()) == ([0], [1])


def test_joint_tokenization_that_changes_the_prompt_is_not_taken():
    """A template whose prompt ends in a space: jointly the space would move into `▁the`, in generation it
    cannot.
    """
    tokenizer = small("byte_level")
    template = (
        "{{ messages[0]['content'] + ': ' }}{% if messages|length > 1 %}{{ messages[1]['content'] "
        "}}{% endif %}"
    )
    form = dataclasses.replace(chat_format("byte_level", "chatml"), template=template)
    encoded = form.encode_conversation(USER, "the station")
    prompt = tokenizer.encode("Hi: ")
    assert tokenizer.encode("Hi: the station")[: len(prompt)] != prompt
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert encoded.exact and encoded.spans.starts[-1] == 11


@pytest.mark.parametrize(
    ("kind", "template", "stop"),
    [
        ("byte_level", "chatml", "<|im_end|>"),  # what the template puts after a response
        ("byte_level", "vicuna_v1.1", "<|endoftext|>"),  # eos_token, printed by the template
        ("tiktoken", "chatml", "<|endoftext|>"),  # <|im_end|> is plain text to this tokenizer
        ("llama_json", "llama2", "</s>"),  # behind template white space, which is not supervised
    ],
)
def test_stop_token(kind, template, stop):
    form = chat_format(kind, template)
    assert form.tokenizer.token_text(form.stop_id) == stop


def custom(tmp_path, template: str, **options) -> ChatFormat:
    path = tmp_path / "custom.jinja"
    path.write_text(template)
    return load_chat_format(small("llama_json"), str(path), **options)


def test_a_template_that_prints_the_date_does_not_change_over_night(tmp_path):
    form = custom(tmp_path, "{{ strftime_now('%d %B %Y') }} {{ date_string }} " + TEMPLATES["alpaca"])
    assert form.render_prompt(USER).startswith("26 July 2024 26 Jul 2024 ")


@pytest.mark.parametrize("refusal", ["{{ raise_exception('no system') }}", ""])  # refused aloud, or forgotten
def test_a_system_message_that_the_template_has_no_place_for_joins_the_user(refusal, tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}" + refusal + "{% elif m['role'] == 'user' %}"
        "Q: {{ m['content'] }} A:{% else %} {{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    form = custom(tmp_path, template)
    assert form.render_prompt(TALK) == "Q: Be kind.\n\nHi A: Hello</s>Q: Who? A:"


def test_text_that_the_template_puts_before_a_response_belongs_to_the_prompt(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}"
        "A:<think>\n\n</think>\n\n{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    form = custom(tmp_path, template)
    assert form.render_prompt(USER) == "Q: Hi\nA:<think>\n\n</think>\n\n"
    encoded = form.encode_conversation(USER, "Sure")
    assert encoded.exact and encoded.spans.starts[-1] == 4 and not encoded.spans.has(SpanFlag.LEADING).any()


def test_hash_follows_tokenizer_template_and_system():
    forms = [load_chat_format(small(k), t, s) for k in KINDS for t in TEMPLATES for s in (None, "", "x")]
    assert len({form.sha256 for form in forms}) == len(forms)
    assert load_chat_format(small("tiktoken"), "chatml").sha256 == chat_format("tiktoken", "chatml").sha256


def test_bad_input(tmp_path):
    tokenizer = small("llama_json")
    with pytest.raises(UserError, match=r"sources\[1\].chat_template to one of vicuna_v1.1"):
        load_chat_format(tokenizer, where="sources[1]")
    with pytest.raises(
        UserError,
        match=r"target.chat_template: 'chatlm' is not a known template and not a file\. Set it to one of",
    ):
        load_chat_format(tokenizer, "chatlm")
    with pytest.raises(UserError, match=r'has no EOS token.* Set "eos_token" in its tokenizer_config'):
        load_chat_format(dataclasses.replace(tokenizer, eos_id=None), "alpaca")
    with pytest.raises(UserError, match="does not print the assistant"):
        custom(tmp_path, "{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="refuses the messages: only one"):
        custom(
            tmp_path,
            "{% if messages|length > 3 %}{{ raise_exception('only one') }}{% endif %}" + TEMPLATES["alpaca"],
        ).encode_prompt(TALK)
    with pytest.raises(UserError, match="Expected an expression"):
        custom(tmp_path, "{% if %}")


def test_real_llama2_and_vicuna_prompts():
    """Token ids of the Vicuna prompt's end and of a first answer token, as in the published vocabulary."""
    if not (REAL / "llama2").is_dir():
        pytest.skip(f"{REAL / 'llama2'} is absent")
    form = load_chat_format(load_tokenizer(REAL / "llama2"), "vicuna_v1.1")
    encoded = form.encode_conversation(USER, "Sure, 12")
    assert encoded.ids[:3].tolist() == [1, 319, 13563]  # <s> ▁A ▁chat
    assert encoded.ids[encoded.prompt_length - 5 :].tolist() == [
        319,
        1799,
        9047,
        13566,
        29901,
        18585,
        29892,
        29871,
        29896,
        29906,
        2,
    ]
    assert encoded.spans.ends.tolist() == [4, 5, 6, 7, 8, 9]


def test_llama_json_is_the_same_as_its_transformers_tokenizer_in_a_prompt():
    form = chat_format("llama_json", "vicuna_v1.1")
    hf = llama_json()
    assert form.encode_prompt(USER) == hf(form.render_prompt(USER)).input_ids
