"""Laws of every tokenizer: ids are the library's own, bytes are the vocabulary's own, special strings only
when asked.
"""

import json
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    EXACT_KINDS,
    LOSSY_KINDS,
    RANK_FILES,
    REAL,
    REAL_KINDS,
    hugging_face,
    llama_json,
    make_tokenizer,
    small_tokenizer,
)
from strange_texts import TEXTS

from megatron_fuse.errors import UserError
from megatron_fuse.tokenization import Tokenizer, load_tokenizer
from megatron_fuse.tokenization.hugging_face import _canonical, backend_state

quick = settings(max_examples=60, deadline=None, database=None)
EXACT = [*EXACT_KINDS, *(f"real/{kind}" for kind in REAL_KINDS)]


@pytest.fixture(params=EXACT)
def tokenizer(request) -> Tokenizer:
    return named(request.param)


@cache
def real(kind: str) -> Tokenizer:
    return load_tokenizer(REAL / kind)


def named(name: str) -> Tokenizer:
    if not name.startswith("real/"):
        return small_tokenizer(name)
    if not (REAL / name[5:]).is_dir():
        pytest.skip(f"{REAL / name[5:]} is absent")
    return real(name[5:])


@pytest.mark.parametrize("name", EXACT)
def test_continuation_spells_exactly_the_text(name):
    tokenizer = named(name)

    @quick
    @given(TEXTS)
    @example("▁")
    def law(text):
        ids = tokenizer.encode_continuation(text)
        assert tokenizer.joined_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert not tokenizer.special_ids & set(ids)

    law()


@pytest.mark.parametrize(
    "kind", ["llama_json", "llama_metaspace", "byte_level", "t5_json", "t5_json_metaspace"]
)
@pytest.mark.parametrize("change", ["none", "another order", "another id", "a merge less", "no file"])
def test_what_a_file_says_does_not_change_what_is_read_from_memory(kind, change):
    tokenizer = hugging_face(kind)
    state = backend_state(tokenizer)
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model, vocabulary = said["model"], said["model"]["vocab"]
    if change == "another order":
        model["vocab"] = (
            dict(reversed(vocabulary.items())) if isinstance(vocabulary, dict) else vocabulary[::-1]
        )
    elif change == "another id" and isinstance(vocabulary, dict):
        model["vocab"] = {piece: token + 1 for piece, token in vocabulary.items()}
    elif change == "a merge less" and "merges" in model:
        model["merges"] = model["merges"][1:]
    read = backend_state(tokenizer, None if change == "no file" else said)
    assert read == state and list(read["model"]["vocab"]) == list(state["model"]["vocab"])
    assert _canonical(read) == json.dumps(state, sort_keys=True)


@pytest.mark.parametrize("name", [*EXACT, *LOSSY_KINDS])
def test_continuations_together_are_those_alone(name):
    tokenizer = named(name)
    words = [piece.decode("utf-8", "ignore") for piece in tokenizer.token_bytes[:600]]

    @quick
    @given(st.lists(TEXTS | st.sampled_from(words), max_size=8), st.sampled_from([0, 254, 600]))
    @example(["", "a", "", "▁", " \n ", ""], 254)  # around the end of what the library takes at once
    def law(texts, before):
        texts = words[:before] + texts
        assert list(tokenizer.encode_continuations(texts)) == [
            tokenizer.encode_continuation(text) for text in texts
        ]

    law()


@pytest.mark.parametrize("name", EXACT)
def test_plain_text_never_becomes_a_special_token(name):
    tokenizer = named(name)
    strings = [text for text, token in tokenizer.added_tokens.items() if token in tokenizer.special_ids]

    @quick
    @given(st.lists(st.sampled_from([*strings, "a", " ", "\n"]), max_size=6).map("".join))
    def law(text):
        assert not tokenizer.special_ids & set(tokenizer.encode(text))

    law()
    for text in strings:
        assert tokenizer.encode(f"a{text}b", special=True).count(tokenizer.added_tokens[text]) == 1


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_whole_text_has_at_most_the_dummy_prefix_before_it(kind):
    tokenizer = small_tokenizer(kind)
    prefix = b" " if kind.startswith(("sentencepiece", "llama_")) else b""

    @quick
    @given(st.text(st.characters(codec="ascii"), min_size=1, max_size=12))
    def law(text):
        # That one adds none to a space.
        dummy = b"" if kind == "llama_metaspace" and text.startswith(" ") else prefix
        assert tokenizer.joined_bytes(tokenizer.encode(text)) == dummy + text.encode()

    law()


def test_a_piece_has_the_bytes_that_the_library_decodes_in_the_middle_of_a_text(tokenizer):
    """Against the libraries' own decoders, an independent road from the same vocabulary.

    Whole characters only.
    """
    anchor = tokenizer.encode_continuation("x")
    if "tiktoken" in type(tokenizer.backend).__module__:
        pytest.skip("tiktoken's file holds the bytes themselves")
    if tokenizer.name.endswith(".model"):
        library = sentencepiece.SentencePieceProcessor(model_file=tokenizer.name)
        decode = library.decode
    else:
        decode = tokenizer.hugging_face().backend_tokenizer.decode
    step = max(1, tokenizer.vocab_size // 2000)
    for token in range(0, tokenizer.vocab_size, step):
        piece = tokenizer.token_bytes[token]
        if piece and piece.decode(errors="ignore").encode() == piece:
            assert decode([*anchor, token]) == "x" + piece.decode(), token


@pytest.mark.parametrize("kind", [kind for kind in [*EXACT_KINDS, *LOSSY_KINDS] if kind not in RANK_FILES])
def test_ids_are_the_librarys_own(kind, tmp_path):
    path = make_tokenizer(kind, tmp_path)
    tokenizer = load_tokenizer(path)
    if path.suffix == ".model":
        encode = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    else:
        library = hugging_face(kind)

        def encode(text):
            return library(text, add_special_tokens=False, split_special_tokens=True).input_ids

    @quick
    @given(TEXTS)
    @example("Hello  world")  # transformers' conversion of a SentencePiece model cuts this otherwise
    def law(text):
        assert tokenizer.encode(text) == encode(text)

    law()


def test_a_word_piece_does_not_get_the_dummy_prefix(tokenizer):
    pieces = [tokenizer.token_bytes[i] for i in tokenizer.encode_continuation("ization")]
    assert b"".join(pieces) == b"ization"


@pytest.mark.parametrize(
    ("kind", "bos", "eos", "adds_bos"),
    [
        ("sentencepiece", "<s>", "</s>", True),  # a bare Llama-like model: BOS first, as Llama-2 does
        ("llama_json", "<s>", "</s>", True),
        ("llama_metaspace", "<s>", "</s>", True),
        ("byte_level", None, "<|endoftext|>", False),
        ("tiktoken", None, "<|endoftext|>", False),
        ("o200k", None, "<|endoftext|>", False),
        ("llama3", "<|begin_of_text|>", "<|end_of_text|>", True),
        ("t5", None, "</s>", False),
        ("t5_json", None, "</s>", False),
    ],
)
def test_special_tokens(kind, bos, eos, adds_bos):
    tokenizer = small_tokenizer(kind)
    assert tokenizer.bos_id == (tokenizer.added_tokens[bos] if bos else None)
    assert tokenizer.eos_id == tokenizer.added_tokens[eos]
    assert tokenizer.token_text(tokenizer.eos_id) == eos
    assert tokenizer.adds_bos == adds_bos
    assert {tokenizer.token_bytes[token] for token in tokenizer.special_ids} == {b""}
    # A padded logit column.
    assert tokenizer.joined_bytes([tokenizer.eos_id, tokenizer.vocab_size + 7]) == b""


def test_settings_beside_a_sentencepiece_model(tmp_path):
    """added tokens, template and legacy flag live in tokenizer_config.json, as in a Vicuna directory."""
    path = make_tokenizer("sentencepiece", tmp_path)
    size = load_tokenizer(path).vocab_size
    config = {
        "eos_token": {"content": "<end>"},
        "add_bos_token": False,
        "legacy": False,
        "chat_template": "T",
        "added_tokens_decoder": {
            str(size): {"content": "<end>", "special": True},
            str(size + 1): {"content": "<tool>", "special": False},
            str(size + 2): {"content": "<mask>", "special": True},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.adds_bos) == (size, size + 3, False)
    assert tokenizer.chat_template == "T"
    assert size + 2 in tokenizer.special_ids and size + 2 not in tokenizer.encode("a<mask>")
    assert size not in tokenizer.encode("a<end>") and size in tokenizer.encode("a<end>", special=True)
    assert size + 1 in tokenizer.encode("a<tool>b") and tokenizer.token_bytes[size + 1] == b"<tool>"
    new = tokenizer.encode("a<end>b", special=True)
    old = load_tokenizer(make_tokenizer("sentencepiece", tmp_path / "old"))
    assert tokenizer.joined_bytes(new) == b" ab"
    # Legacy: a dummy prefix after each.
    assert old.joined_bytes(old.encode("a</s>b", special=True)) == b" a b"
    assert tokenizer.sha256 != old.sha256


@pytest.mark.parametrize("kind", [*EXACT_KINDS, *LOSSY_KINDS])
def test_hash_follows_the_content(kind, tmp_path):
    path = make_tokenizer(kind, tmp_path / "one")
    again = make_tokenizer(kind, tmp_path / "two")
    assert load_tokenizer(path).sha256 == load_tokenizer(again).sha256
    assert load_tokenizer(path).sha256 not in {
        small_tokenizer(k).sha256 for k in EXACT_KINDS + LOSSY_KINDS if k != kind
    }


def test_hash_sees_an_added_token(tmp_path):
    changed = llama_json().__class__.from_pretrained(make_tokenizer("llama_json", tmp_path / "one"))
    changed.add_tokens(["<tool>"])
    changed.save_pretrained(tmp_path / "two")
    assert load_tokenizer(tmp_path / "one").sha256 != load_tokenizer(tmp_path / "two").sha256


@pytest.mark.parametrize("kind", [kind for kind in EXACT_KINDS if kind != "sentencepiece_unigram"])
def test_hugging_face_tokenizer_for_export(kind, tmp_path):
    """Saved and read again, it cuts text as the original does: an exported model sees what it was trained
    on.
    """
    tokenizer = load_tokenizer(make_tokenizer(kind, tmp_path / "original"))
    tokenizer.hugging_face().save_pretrained(tmp_path / "export")
    exported = load_tokenizer(tmp_path / "export")
    assert (exported.bos_id, exported.eos_id, exported.adds_bos) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.adds_bos,
    )
    assert exported.token_bytes[:400] == tokenizer.token_bytes[:400]

    @quick
    @given(TEXTS)
    @example(
        "Hello" + " " * 8 + "world  and on"
    )  # transformers' own conversion of a SentencePiece model cuts otherwise
    def law(text):
        assert exported.encode(text) == tokenizer.encode(text)

    law()


@pytest.mark.parametrize("kind", ["sentencepiece_unigram", "t5"])
def test_unigram_models_are_not_converted(kind):
    with pytest.raises(UserError, match="only BPE models"):
        small_tokenizer(kind).hugging_face()


@pytest.mark.parametrize(
    ("files", "ask", "words"),
    [
        ({}, "", "tokenizer.json"),  # nothing there: the expected files are named
        ({"notes.txt": b"x"}, "", "no tokenizer found, only notes.txt"),
        ({}, "absent", "absent does not exist"),
        ({"tokenizer.model": b"not a model"}, "tokenizer.model", "not a SentencePiece model"),
        ({"tokenizer.json": b"{"}, "", r"tokenizer\.json: Invalid JSON"),
        ({"vocab.txt": b""}, "vocab.txt", "not a tokenizer file"),
    ],
)
def test_bad_paths(files, ask, words, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path / ask)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("added_tokens.json", "[1]", "must hold an object"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"500": "<tool>"}}',
            r"added_tokens_decoder\.500: ",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "<tool>"}}}',
            r"added_tokens_decoder\.x: ",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["sentencepiece", "llama3"])
def test_bad_settings_beside_a_file(kind, name, content, words, tmp_path):
    make_tokenizer(kind, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(error.value)


def test_word_marks_have_no_exact_bytes(tmp_path):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]")
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_a_directory_of_t5(tmp_path):
    """Its SentencePiece model has a name of its own."""
    make_tokenizer("t5", tmp_path).rename(tmp_path / "spiece.model")
    assert load_tokenizer(tmp_path).sha256 == small_tokenizer("t5").sha256


def test_a_pipeline_that_only_shows_spaces_tells_the_bytes(tmp_path):
    """No decoder: the pre-tokenizer writes spaces as U+2581, so that is what U+2581 means."""
    state = json.loads(hugging_face("t5_json").backend_tokenizer.to_str()) | {"decoder": None}
    hugging_face("t5_json").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert load_tokenizer(tmp_path).token_bytes == small_tokenizer("t5_json").token_bytes


def test_bytes_that_cannot_be_told(tmp_path):
    state = json.loads(hugging_face("t5_json").backend_tokenizer.to_str()) | {
        "decoder": None,
        "pre_tokenizer": None,
    }
    hugging_face("t5_json").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="the bytes of its tokens are not known"):
        load_tokenizer(tmp_path)


def _change_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        # A table of four billion ids would be made for one token.
        (
            "tokenizer.json",
            lambda c: c["model"]["vocab"].update(x=2**32 - 1),
            r"model\.vocab: every id .* one is 4294967295",
        ),
        (
            "tokenizer.json",
            lambda c: c["model"]["vocab"].update(x=7),
            r"model\.vocab: two tokens have the same id",
        ),
        ("tokenizer.json", lambda c: c["added_tokens"].append(5), r"added_tokens\.\d: must be an object"),
        # The library in Rust panics, with an exception that is no Exception.
        (
            "tokenizer.json",
            lambda c: c["post_processor"]["single"][0]["SpecialToken"].update(id="?"),
            "post_processor: transformers cannot load",
        ),
        (
            "tokenizer.json",
            lambda c: c.update(normalizer={"type": "Replace"}),
            "normalizer: transformers cannot load",
        ),
        ("tokenizer_config.json", lambda c: c.update(eos_token=5), "eos_token"),
        ("tokenizer_config.json", lambda c: c.update(chat_template=["x"]), "chat_template"),
        (
            "tokenizer_config.json",
            lambda c: c.update(added_tokens_decoder={"9999999": {"content": "x"}}),
            "9999999",
        ),
        ("config.json", lambda c: c.update(model_type=[{}]), "model_type: must be a valid string"),
    ],
)
def test_damaged_files_of_transformers(file, change, words, tmp_path):
    make_tokenizer("llama_json", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    _change_json(tmp_path / file, change)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and file in str(error.value) and len(str(error.value)) <= 600


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "added_tokens.json",
            {"<tool>": 300},
            r"'<tool>' has id 300, but in tokenizer\.model this is the id of",
        ),  # silently other bytes
        ("added_tokens.json", {"<tool>": 2**40}, "<tool>: "),
        ("added_tokens.json", {"<tool>": [1]}, "<tool>: "),
        (
            "tokenizer_config.json",
            {"eos_token": "</nothing>"},
            "eos_token is '</nothing>', which is not a token",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1e3": {"content": "x"}}}, "1e3"),
        ("special_tokens_map.json", {"eos_token": 5}, "eos_token"),
    ],
)
def test_damaged_settings_beside_a_sentencepiece_model(name, content, words, tmp_path):
    make_tokenizer("sentencepiece", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) <= 600


def test_an_empty_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("folder", ["plain", "with blanks", 'it\'s "quoted"', "$HOME"])
@pytest.mark.parametrize(
    ("name", "called"),
    [("tekken.json", "convert_tekken_tokenizer"), ("tiktoken.model", "TikTokenConverter")],
)
def test_a_vocabulary_in_a_form_of_its_own_is_refused_with_the_command_that_converts_it(
    name: str, called: str, folder: str, tmp_path: Path
) -> None:
    directory = tmp_path / folder
    directory.mkdir()
    (directory / name).write_text("{}")
    with pytest.raises(
        UserError, match=rf"{name} must be converted to tokenizer.json once\. Run "
    ) as refused:
        load_tokenizer(directory)
    words = shlex.split(
        str(refused.value).split("once. Run ")[1].split(" (transformers asks")[0].rpartition("&& ")[2]
    )
    assert (
        words[:2] == ["python", "-c"]
        and words[3:] == [str(directory)]
        and called in words[2]
        and name in words[2]
    )
    compile(words[2], "command", "exec")
    hugging_face("byte_level").save_pretrained(directory)
    assert load_tokenizer(directory).encode("a")
