"""Laws of `encode_spans`: spans cover the text's bytes, no byte and no boundary is claimed that is not
known.
"""

import re
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    EXACT_KINDS,
    LOSSY_KINDS,
    REAL,
    REAL_KINDS,
    hugging_face,
    small_tokenizer,
    t5_model,
)
from strange_texts import TEXTS
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.tokenization import Tokenizer, load_tokenizer
from megatron_fuse.tokenization.hugging_face import wrap_hugging_face
from megatron_fuse.tokenization.normalized_spans import covered, settle, trace

quick = settings(max_examples=100, deadline=None, database=None)


def check_cover(tokenizer: Tokenizer, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The law of every tokenizer, on one text; returns what encode_spans does."""
    ids, ends, lossy = tokenizer.encode_spans(text)
    data = text.encode()
    assert ends.dtype == np.int64 and lossy.dtype == bool and len(ids) == len(ends) == len(lossy)
    edges = [0, *ends.tolist()]
    assert edges == sorted(edges) and (not ids or edges[-1] == len(data))
    for token, (start, end), lost in zip(ids, pairwise(edges), lossy, strict=True):
        assert lost or tokenizer.token_bytes[token] == data[start:end]
    return ids, ends, lossy


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_spans_of_a_tokenizer_that_spells_every_text(kind):
    tokenizer = small_tokenizer(kind)

    @quick
    @given(TEXTS)
    def law(text):
        ids, ends, lossy = check_cover(tokenizer, text)
        assert ids == tokenizer.encode_continuation(text) and not lossy.any()
        assert ends.tolist() == np.cumsum([len(tokenizer.token_bytes[token]) for token in ids]).tolist()

    law()


def _letters(text: str) -> str:
    return "".join(text.replace("▁", " ").split())


# The libraries' own normalisers, white space left out: they add, drop and join it at the ends of what they
# are given.
_sentencepiece = sentencepiece.SentencePieceNormalizer(
    model_proto=t5_model(), add_dummy_prefix=False, remove_extra_whitespaces=False
)
_precompiled = hugging_face("t5_json").backend_tokenizer.normalizer
NORMALIZED_LETTERS = {
    "t5": lambda text: _letters(_sentencepiece.normalize(text)),
    "t5_json": lambda text: _letters(_precompiled.normalize_str(text)),
    "t5_json_metaspace": lambda text: _letters(_precompiled.normalize_str(text)),
}


@pytest.mark.parametrize("kind", LOSSY_KINDS)
def test_spans_of_a_tokenizer_that_normalises(kind):
    """Behind every boundary that is claimed the text goes on as if it began there, and the tokens before it
    spell what the text before it becomes."""
    tokenizer, normalize = small_tokenizer(kind), NORMALIZED_LETTERS[kind]

    @quick
    @given(TEXTS)
    @example("hello㌔ﬁ")  # several tokens of one character
    @example("\x01hello")  # offsets of `tokenizers` are one character off
    @example("\u1100\u1161")  # two characters that become one
    # `tokenizers` drops the first mark: what is left looks like the second one dropped.
    @example("\u00a0\u0e31 \u0e31")
    def law(text):
        ids, ends, lossy = check_cover(tokenizer, text)
        exact = tokenizer.encode_continuation(text)
        if tokenizer.joined_bytes(exact) == text.encode():
            assert ids == exact and not lossy.any()
        known, spelled = 0, ""
        for token, end in zip(ids, ends.tolist(), strict=True):
            piece = tokenizer.token_bytes[token].decode()
            spelled += re.escape(_letters(piece)) if piece else ".+?"  # what <unk> stands for is not told
            if known < end < len(text.encode()):
                known = end
                left, right = text.encode()[:end].decode(), text.encode()[end:].decode()
                assert normalize(left) + normalize(right) == normalize(text)
                assert re.fullmatch(spelled, normalize(left), re.DOTALL), (left, spelled)

    law()


@pytest.mark.parametrize("kind", LOSSY_KINDS)
def test_lossy_ids_are_the_models_own(kind):
    """Behind a newline, which T5 reads as the space of a dummy prefix, a continuation is a text of its
    own.
    """
    tokenizer = small_tokenizer(kind)

    @quick
    @given(TEXTS)
    def law(text):
        assert tokenizer.encode_spans("\n" + text)[0] == tokenizer.encode("\n" + text)

    law()


@pytest.mark.parametrize("kind", LOSSY_KINDS)
@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("hello\nworld", [("hello", False), ("\nworld", True)]),  # a newline becomes a space
        ("hello  world 1😀", [("hello", False), ("  world", True), (" ", False), ("1", False), ("😀", True)]),
        ("hello \n", [("hello \n", True)]),  # dropped at the end
        (" \nhello", [(" \nhello", True)]),
        (" é\n\n  hello", [(" ", False), ("é", False), ("\n\n  hello", True)]),
        ("e\u0301 hello e\u0301", [("e\u0301", True), (" hello", False), (" ", False), ("e\u0301", True)]),
        ("hello\n\nhello\t\thello", [("hello", False), ("\n\nhello", True), ("\t\thello", True)]),
        ("ﬁ the", [("", True), ("ﬁ", True), (" the", False)]),  # f, i: no boundary between them
        ("ｔx", [("ｔ", True), ("x", False)]),  # a boundary behind a character that changes
        ("\n", []),  # nothing is left of it
        ("", []),
    ],
)
def test_spans_by_example(kind, text, spans):
    assert shown_spans(small_tokenizer(kind), text) == spans


def shown_spans(tokenizer: Tokenizer, text: str) -> list[tuple[str, bool]]:
    _, ends, lossy = check_cover(tokenizer, text)
    parts = [text.encode()[start:end].decode() for start, end in pairwise([0, *ends.tolist()])]
    return list(zip(parts, lossy.tolist(), strict=True))


@pytest.mark.parametrize(
    ("normalizer", "text", "spans"),
    [
        # Llama's: only the prefix goes
        (
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
            "hello\n the",
            [("hello", 0), ("\n", 1), (" the", 0)],
        ),
        # ALBERT's
        (
            [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()],
            "HELLO ťhe hello",
            [("HELLO", 1), (" ťhe", 1), (" hello", 0)],
        ),
    ],
)
def test_other_normalisers(normalizer, text, spans):
    backend = tokenizers.Tokenizer.from_str(hugging_face("t5_json").backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence(normalizer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert shown_spans(wrap_hugging_face(library, "small"), text) == spans


@quick
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=12), st.integers(0, 5))
def test_settle(tokens, extra):
    """A boundary is claimed exactly where no token before it reaches over the beginning of one behind it."""
    starts = np.array(sorted(start for start, _ in tokens), np.int64)
    ends = starts + np.array([length for _, length in tokens], np.int64)
    size = int(ends.max(initial=0)) + extra
    settled, shared = settle(starts, ends, size)
    assert len(settled) == len(shared) == len(tokens)
    begin = 0  # of the stretch
    for token in range(len(tokens)):
        last = token == len(tokens) - 1
        known = last or ends[: token + 1].max() <= starts[token + 1 :].min()
        alone = known and (token == 0 or ends[:token].max() <= starts[token:].min())
        assert shared[token] == (not alone)
        assert settled[token] == (size if last else ends[: token + 1].max() if known else begin)
        begin = settled[token]


def _context(text: str) -> str:
    """A normaliser that no cutting follows: what comes first decides."""
    return text.upper() if text[:1].isupper() else text.replace("e", "")


NORMALIZERS = {
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "nfd": lambda text: unicodedata.normalize("NFD", text),
    "lower": str.lower,
    "one space": lambda text: re.sub(r"\s+", " ", text),
    "nothing": lambda text: "",
    "same": lambda text: text,
    "longer": lambda text: text.replace("a", "aaa").replace("😀", ":)"),
    "context": _context,
    "title": str.title,
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_trace(name):
    """Whatever a normaliser does, a place is claimed only if what stands before it becomes what is said to
    be made of it.
    """
    normalize = NORMALIZERS[name]

    @quick
    @given(TEXTS)
    @example("Ae be")
    def law(text):
        outcome, origin = trace(text, normalize)
        data, made = text.encode(), outcome.encode()
        assert outcome == normalize(text) and len(origin) == len(made) + 1
        assert (np.diff(origin) >= 0).all() and origin[0] >= 0 and origin[-1] == len(data)
        for place in np.flatnonzero(np.diff(origin)) + 1:
            left = data[: origin[place]]
            if (
                place < len(made)
                and left.decode(errors="ignore").encode() == left
                and name not in ("context", "reversed")
            ):
                assert normalize(left.decode()).encode() == made[:place]

    law()


@quick
@given(TEXTS)
def test_a_normaliser_that_changes_nothing_is_traced_to_the_byte(text):
    _, origin = trace(text, str)
    places = np.arange(len(text.encode()))
    assert origin.tolist() == [*places.tolist(), len(places)]
    starts, ends = covered(places, places + 1, origin)
    assert (starts == places).all() and (ends == places + 1).all()


LONG = {
    "spaces": " " * 1_000_000,
    "spaces and a word": " " * 1_000_000 + "\nx",
    "one letter": "a" * 1_000_000,
    "no white space": "international12été日本😀" * 25_000,
    "marks": "a" + "\u0301" * 500_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT_KINDS, *LOSSY_KINDS, *(f"real/{kind}" for kind in REAL_KINDS)])
def test_a_megabyte(name):
    """Nothing here may be quadratic, and no library may give up."""
    if name.startswith("real/") and not (REAL / name[5:]).is_dir():
        pytest.skip(f"{REAL / name[5:]} is absent")
    tokenizer = load_tokenizer(REAL / name[5:]) if name.startswith("real/") else small_tokenizer(name)
    for text in LONG.values():
        check_cover(tokenizer, text)
