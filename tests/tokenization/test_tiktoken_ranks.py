"""tiktoken rank files: the published patterns and special tokens, and files that are not what they seem."""

import base64
import dataclasses
import hashlib
import json

import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from small_tokenizers import RANK_FILES, make_tokenizer, rank_file, small_tokenizer
from strange_texts import TEXTS
from tokenizers import Regex, pre_tokenizers

from megatron_fuse.errors import UserError
from megatron_fuse.tokenization import load_tokenizer, tiktoken_ranks
from megatron_fuse.tokenization.tiktoken_encodings import ENCODINGS

quick = settings(max_examples=100, deadline=None, database=None)
BYTES = {bytes([byte]): byte for byte in range(256)}


def write_ranks(path, ranks):
    lines = [base64.b64encode(piece) + f" {rank}\n".encode() for piece, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("kind", RANK_FILES)
def test_ids_are_tiktokens_own(kind, tmp_path, monkeypatch):
    """With the pattern that tiktoken itself publishes; Llama-3's is cl100k_base's.

    The ranks come from pieces that the pattern cuts out. (tiktoken writes cl100k_base's in another way today,
    which keeps white space at the end of a text in one piece; no token of the real ranks shows it.)
    """
    (tmp_path / RANK_FILES[kind]).write_bytes(rank_file("o200k" if kind == "o200k" else "llama3"))
    tokenizer = load_tokenizer(tmp_path)
    ranks = {piece: rank for rank, piece in enumerate(tokenizer.token_bytes) if piece}
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    published = getattr(tiktoken_ext.openai_public, "o200k_base" if kind == "o200k" else "cl100k_base")()
    library = tiktoken.Encoding(**published | {"special_tokens": {}})
    if kind != "llama3":
        assert tokenizer.added_tokens == published["special_tokens"]

    @quick
    @given(TEXTS)
    def law(text):
        assert tokenizer.encode(text) == tokenizer.encode_continuation(text) == library.encode_ordinary(text)

    law()


# By hand from the published patterns. o200k: a word ends before a capital that follows a small letter, takes
# its marks and its contraction along, and punctuation takes slashes along.
CL100K_PIECES = [
    ("HelloWorld's 1234567", ["HelloWorld", "'s", " ", "123", "456", "7"]),
    ("don'T STOP it", ["don", "'T", " STOP", " it"]),
    ("a\n\n  b\r\n", ["a", "\n\n", " ", " b", "\r\n"]),
    ("x != y();\n/x", ["x", " !=", " y", "();\n", "/x"]),
    ("ที่日本ABC", ["ท", "ี่", "日本ABC"]),
    ("   end   ", ["  ", " end", "   "]),
]
O200K_PIECES = [
    ("HelloWorld's 1234567", ["Hello", "World's", " ", "123", "456", "7"]),
    ("don'T STOP it", ["don'T", " STOP", " it"]),
    ("a\n\n  b\r\n", ["a", "\n\n", " ", " b", "\r\n"]),
    ("x != y();\n/x", ["x", " !=", " y", "();\n/", "x"]),
    ("ที่日本ABC", ["ที่日本", "ABC"]),
    ("   end   ", ["  ", " end", "   "]),
    ("McDonald ABCdef", ["Mc", "Donald", " ABCdef"]),
]


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [(name, *case) for name in ("cl100k_base", "llama3") for case in CL100K_PIECES]
    + [("o200k_base", *case) for case in O200K_PIECES],
)
def test_pattern(name, text, pieces):
    """In both regex engines: tiktoken's, where every expected piece is one token, and that of
    `tokenizers`.
    """
    pattern = ENCODINGS[name].pattern
    ranks = BYTES | {
        piece: 256 + n for n, piece in enumerate({p.encode(): 0 for p in pieces if len(p.encode()) > 1})
    }
    encoding = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert [encoding.decode([token]) for token in encoding.encode_ordinary(text)] == pieces
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(text)
    assert [piece for piece, _ in split] == pieces


@pytest.mark.parametrize("kind", RANK_FILES)
def test_an_overlong_run_of_white_space_is_cut_alike(kind, monkeypatch):
    """tiktoken's regex engine gives up on a million; here three are called overlong, where it can still be
    compared.
    """
    tokenizer = small_tokenizer(kind)
    special = next(iter(tokenizer.added_tokens))

    @quick
    @given(TEXTS)
    def law(text):
        for whole in (text, f"{text} \n    x{special}y{text}"):
            expected = [tokenizer.encode(whole, special=flag) for flag in (False, True)]
            with monkeypatch.context() as patch:
                patch.setattr(tiktoken_ranks, "LONGEST_RUN", 3)
                assert [tokenizer.encode(whole, special=flag) for flag in (False, True)] == expected

    law()
    text = "a" + " " * 1_000_001 + "b"
    assert tokenizer.decode(tokenizer.encode_continuation(text)) == text


def test_a_token_that_no_merges_reach_is_exported(tmp_path):
    """tiktoken looks a whole piece up first; such tokens exist in the published ranks."""
    tokenizer = load_tokenizer(write_ranks(tmp_path / "tokenizer.model", BYTES | {b"abc": 256}))
    assert tokenizer.encode("abc") == [256] and tokenizer.encode("abcd") == [97, 98, 99, 100]
    exported = tokenizer.hugging_face()
    for text in ("abc", "abcd"):
        assert exported.encode(text) == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_special_tokens_of_llama3():
    """256 behind the ranks, at the places they have in Llama-3.1."""
    tokenizer = small_tokenizer("llama3")
    first = tokenizer.bos_id
    assert tokenizer.vocab_size == first + 256 and tokenizer.special_ids == frozenset(
        range(first, first + 256)
    )
    places = {tokenizer.added_tokens[text] - first: text for text in tokenizer.added_tokens}
    assert len(places) == 256
    assert [places[n] for n in (6, 7, 8, 9, 10)] == [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ]
    assert [places[n] for n in (2, 3, 4, 5, 11, 255)] == [
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>",
        "<|reserved_special_token_247|>",
    ]
    header = "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    ids = tokenizer.encode(header, special=True)
    assert [ids[0], ids[-1]] == [first + 6, first + 9] and first + 7 in ids
    assert not tokenizer.special_ids & set(tokenizer.encode(header))


def test_settings_beside_a_rank_file(tmp_path):
    """tokenizer_config.json renames reserved tokens (here as Llama-3.0 has them), adds some, and says what
    ends a text.
    """
    path = make_tokenizer("llama3", tmp_path)
    plain = load_tokenizer(path)
    first = plain.bos_id
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|eot_id|>"},
        "pad_token": "<|more|>",
        "add_bos_token": False,
        "chat_template": "T",
        "added_tokens_decoder": {
            str(first + 4): {"content": "<|reserved_special_token_2|>", "special": True},
            str(first + 5): {"content": "<|reserved_special_token_3|>", "special": True},
            str(first + 256): {"content": "<|more|>", "special": True},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (first, first + 9, first + 256)
    assert (tokenizer.adds_bos, tokenizer.chat_template, tokenizer.vocab_size) == (
        False,
        "T",
        plain.vocab_size + 1,
    )
    assert tokenizer.token_text(first + 4) == "<|reserved_special_token_2|>"
    assert "<|finetune_right_pad_id|>" not in tokenizer.added_tokens
    assert tokenizer.encode("<|reserved_special_token_3|>", special=True) == [first + 5]
    assert tokenizer.sha256 != plain.sha256
    config["added_tokens_decoder"] = {"7": {"content": "<|more|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'<.more.>' has id 7"):
        load_tokenizer(tmp_path)


def test_a_model_file_is_told_by_its_content(tmp_path):
    write_ranks(tmp_path / "tokenizer.model", BYTES)
    assert (
        load_tokenizer(tmp_path).vocab_size == load_tokenizer(tmp_path / "tokenizer.model").vocab_size == 512
    )


@pytest.mark.parametrize("name", ["cl100k_base.tiktoken", "o200k_base.tiktoken", "tokenizer.model"])
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({piece: rank for piece, rank in BYTES.items() if rank != 65}, "are not 0, 1, 2"),  # a line is lost
        (BYTES | {b"ab": 255}, "are not 0, 1, 2"),  # a rank twice
        ({bytes([0x42, byte]): byte for byte in range(256)}, "256 of the 256 single bytes have no rank"),
        (BYTES | {bytes([65, byte]): 256 + byte for byte in range(256)}, "holds 512 ranks, but .* has 500"),
    ],
)
def test_damaged_rank_files(name, ranks, words, tmp_path, monkeypatch):
    key = "llama3" if name.endswith(".model") else name.split(".")[0]
    monkeypatch.setitem(ENCODINGS, key, dataclasses.replace(ENCODINGS[key], ranks=500))
    write_ranks(tmp_path / name, ranks)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["o200k_base.tiktoken", "tokenizer.model"])
def test_a_renamed_rank_file_is_refused(name, tmp_path, monkeypatch):
    data = rank_file("llama3")
    published = dataclasses.replace(ENCODINGS["cl100k_base"], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(ENCODINGS, "cl100k_base", published)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        UserError, match=r"rank file of cl100k_base .* Rename the file to cl100k_base\.tiktoken"
    ) as error:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    (tmp_path / name).rename(tmp_path / "cl100k_base.tiktoken")
    load_tokenizer(tmp_path / "cl100k_base.tiktoken")


def test_hashes_are_those_that_tiktoken_expects(monkeypatch):
    expected = {}
    monkeypatch.setattr(
        tiktoken_ext.openai_public,
        "load_tiktoken_bpe",
        lambda place, expected_hash: expected.update({place.rpartition("/")[2]: expected_hash}) or {},
    )
    for name in ("cl100k_base", "o200k_base"):
        getattr(tiktoken_ext.openai_public, name)()
        assert ENCODINGS[name].sha256 == expected[f"{name}.tiktoken"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("o9.tiktoken", b"YQ== 0\n", "'o9' is not known .*Rename"),  # which pattern?
        ("cl100k_base.tiktoken", b"YQ==\n", "not a tiktoken rank file"),
        ("cl100k_base.tiktoken", b"YQ== zero\n", "not a tiktoken rank file"),
        ("tokenizer.model", b"YQ== 0\n\x00\xff\n", "not a tiktoken rank file"),
    ],
)
def test_bad_rank_files(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
