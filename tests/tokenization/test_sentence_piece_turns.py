"""Laws of the settings beside a SentencePiece model: which user-defined pieces end a turn, and what added
tokens strip.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from sentencepiece import sentencepiece_model_pb2
from small_tokenizers import sentencepiece_model
from strange_texts import TEXTS

from megatron_fuse.chat import load_chat_format
from megatron_fuse.tokenization import load_tokenizer

quick = settings(max_examples=40, deadline=None, database=None)
START, END = "<start_of_turn>", "<end_of_turn>"
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + "
    "'<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)


@cache
def _gemma() -> tuple[bytes, int]:
    """A model with Gemma's pieces, and the id of the first."""
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model("bpe", byte_fallback=True))
    first = len(model.pieces)
    for piece in (START, END, "▁▁▁▁▁▁", "\n\n"):
        model.pieces.add(piece=piece, score=0, type=model.SentencePiece.USER_DEFINED)
    model.normalizer_spec.add_dummy_prefix = False
    return model.SerializeToString(), first


def _directory(path: Path, named: bool, **keys: object) -> Path:
    data, first = _gemma()
    (path / "tokenizer.model").write_bytes(data)
    entries = {str(first + i): {"content": text, "special": True} for i, text in enumerate((START, END))}
    config = {"chat_template": GEMMA, "added_tokens_decoder": entries if named else {}} | keys
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("named", [True, False])
def test_a_user_defined_piece_ends_the_turn(named: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_directory(tmp_path, named))
    end = _gemma()[1] + 1
    chat = load_chat_format(tokenizer)
    assert chat.stop_id == tokenizer.added_tokens[END] == end
    assert tokenizer.token_text(end) == END
    assert (end in tokenizer.special_ids) == named
    encoded = chat.encode_conversation([{"role": "user", "content": "hello"}], "the answer")
    assert encoded.ids[-1] == end


def test_a_special_piece_is_text_in_a_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_directory(tmp_path, named=True))

    @quick
    @given(TEXTS)
    @example("")
    def law(text: str) -> None:
        text = f"{text}{END} x{START}"
        ids = tokenizer.encode_continuation(text)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.joined_bytes(ids) == text.encode()
        assert not tokenizer.special_ids & set(tokenizer.encode(text))

    law()
    assert {_gemma()[1], _gemma()[1] + 1} <= set(tokenizer.encode(f"a{END} x{START}", special=True))


@pytest.mark.parametrize("named", [True, False])
def test_the_export_has_the_same_turns(named: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_directory(tmp_path, named))
    tokenizer.hugging_face().save_pretrained(tmp_path / "export")
    exported = load_tokenizer(tmp_path / "export")
    text = f"{START}user\nhello world{END}\n{START}assistant\n\n\nsure"
    assert exported.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert load_chat_format(exported).stop_id == load_chat_format(tokenizer).stop_id


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_added_tokens_take_white_space(left: bool, right: bool, legacy: bool, tmp_path: Path) -> None:
    """Phi-3's `<|user|>` takes the newline behind it."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", byte_fallback=True))
    size = load_tokenizer(tmp_path).vocab_size
    entry = {"content": "<|user|>", "special": True, "lstrip": left, "rstrip": right}
    config = {"legacy": legacy, "added_tokens_decoder": {str(size): entry}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    before, after = "hello" if left else "hello \n", "world" if right else "\n world"
    given_ids = tokenizer.encode("hello \n<|user|>\n world", special=True)
    expected = tokenizer.encode(f"{before}<|user|>{after}", special=True)
    assert given_ids == expected
    assert tokenizer.joined_bytes(given_ids).replace(b" ", b"") == (before + after).replace(" ", "").encode()
    assert tokenizer.encode_continuation("hello \n<|user|>\n world") == load_tokenizer(
        tmp_path / "tokenizer.model"
    ).encode_continuation("hello \n<|user|>\n world")
    exported = tokenizer.hugging_face()
    assert exported.encode("hello \n<|user|>\n world", add_special_tokens=False) == given_ids


@pytest.mark.parametrize(
    ("control", "config", "prefixes"),
    [
        (True, {}, 1),  # Mistral's later models, without settings
        (False, {}, 2),  # Llama-2 and Mistral's first: [INST] is text, </s> is not
        (True, {"legacy": True}, 2),
        (False, {"legacy": False}, 1),
        (True, {"legacy": None}, 1),
    ],
)
def test_the_dummy_prefix_behind_a_special_token_is_the_models(
    control: bool, config: dict, prefixes: int, tmp_path: Path
) -> None:
    """`]▁Say` where the tokenizer adds no prefix there, else `]▁▁Say`: the text's own space behind one
    more.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model("bpe", byte_fallback=True))
    if control:
        model.pieces.add(piece="[INST]", score=0, type=model.SentencePiece.CONTROL)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    name = "[INST]" if control else "</s>"
    ids = tokenizer.encode(f"{name} the", special=True)
    cut = ids[ids.index(tokenizer.added_tokens[name]) + 1 :]
    assert tokenizer.joined_bytes(cut) == b" " * prefixes + b"the"
