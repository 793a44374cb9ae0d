"""The nearest piece is the one that comparing with every piece would find."""

import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plain_edit_distance import nearest_of_all

from megatron_fuse.alignment import edit_distance, edit_patterns
from megatron_fuse.alignment.edit_distance import characters, nearest_pieces

# few different parts, so that ties and equal pieces are common: letters, a space, a character, its first byte
# alone
PIECES = st.lists(st.sampled_from([b"a", b"b", b" ", "é".encode(), b"\xc3", b"\0"]), max_size=6).map(b"".join)


# () has every piece compared with all that shares characters, (9, 9) those that are farther than one edit
LOOKED_UP = [edit_distance.LONGEST, (), (9, 9), (5, 4, 3, 2), (2, 3, 4, 5)]


@pytest.mark.parametrize("longest", LOOKED_UP)
def test_nearest_is_what_comparing_with_all_finds(longest, monkeypatch):
    monkeypatch.setattr(edit_distance, "LONGEST", longest)

    @example([b"aaba"], [b"aa", b"aaa"])
    @given(st.lists(PIECES, max_size=12), st.lists(PIECES, min_size=1, max_size=30, unique=True))
    def law(pieces, vocabulary):
        found = [vocabulary[index] for index in nearest_pieces(pieces, vocabulary)]
        assert found == [nearest_of_all(piece, vocabulary) for piece in pieces]

    law()


def words(seed: int, alphabet: str, longest: int, count: int) -> list[bytes]:
    """Different words, long ones among them that share beginnings, endings or the middle with others."""
    rng = random.Random(seed)
    parts = [
        "".join(rng.choices(alphabet, k=rng.randint(1, max(longest // 3, 1)))) for _ in range(count // 4)
    ]
    made = {"".join(rng.choices(parts, k=rng.randint(1, 3))).encode() for _ in range(3 * count)}
    return rng.sample(sorted(made), min(count, len(made)))


# a few letters: many ties; an alphabet: as in words; several scripts: up to 4 bytes a character; long:
# farther than 3 edits
@pytest.mark.parametrize(
    ("alphabet", "longest"),
    [("ab", 6), ("abcdefghijklmnopqrstuvwxyz ", 12), ("ae é日本語🙂ßж", 9), ("abcdefgh", 24)],
)
# Some pieces, and some strings of the vocabulary, at once.
@pytest.mark.parametrize("in_parts", [False, True])
def test_words(alphabet, longest, in_parts, monkeypatch):
    if in_parts:
        monkeypatch.setattr(edit_patterns, "_QUERY_KEYS", 2000)
        monkeypatch.setattr(edit_patterns, "_BLOCK_KEYS", 40)
    made = words(3, alphabet, longest, 240)
    pieces, vocabulary = [*made[:60], b" " + made[-1]], made[60:]
    found = [vocabulary[index] for index in nearest_pieces(pieces, vocabulary)]
    assert found == [nearest_of_all(piece, vocabulary) for piece in pieces]


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_equal_hashes_of_different_patterns_do_no_harm(distinct, monkeypatch):
    """Here a hash knows characters by a remainder only, so that most look-ups find strings that are
    farther away.
    """
    monkeypatch.setattr(edit_patterns, "_mixed", lambda codes: codes.astype(np.uint64) % np.uint64(distinct))
    made = words(5, "abcdefg", 9, 200)
    pieces, vocabulary = made[:50], made[50:]
    found = [vocabulary[index] for index in nearest_pieces(pieces, vocabulary)]
    assert found == [nearest_of_all(piece, vocabulary) for piece in pieces]


def test_progress_counts_every_piece_once():
    made = words(7, "abcdefgh", 24, 200)
    decided = []
    nearest_pieces(made[:50], made[50:], decided.append)
    assert sum(decided) == 50


# 64: one machine word of rapidfuzz; 254, 255, 256: what a distance in one byte can hold
@pytest.mark.parametrize("length", [63, 64, 65, 254, 255, 256, 600])
def test_long_pieces(length):
    rng = random.Random(length)
    vocabulary = [bytes(rng.choices(b"ab", k=size)) for size in (1, 2, 40, length - 2, length, length + 1)]
    pieces = [bytes(rng.choices(b"ab", k=length)), vocabulary[4][1:], b"c" * length, b"", b"c"]
    found = [vocabulary[index] for index in nearest_pieces(pieces, vocabulary)]
    assert found == [nearest_of_all(piece, vocabulary) for piece in pieces]
    # All lengths differ by hundreds.
    assert [vocabulary[index] for index in nearest_pieces(pieces, vocabulary[:2])] == [
        nearest_of_all(piece, vocabulary[:2]) for piece in pieces
    ]


def test_empty_sides():
    assert nearest_pieces([b"a", b""], []).tolist() == [-1, -1]
    assert nearest_pieces([], [b"a"]).tolist() == []


def test_the_vocabularys_numbering_does_not_matter():
    rng = np.random.default_rng(5)
    vocabulary = [bytes(rng.integers(97, 100, size).tolist()) for size in range(1, 40)]
    pieces = [bytes(rng.integers(97, 101, size).tolist()) for size in range(1, 40)]
    order = rng.permutation(len(vocabulary))
    shuffled = nearest_pieces(pieces, [vocabulary[index] for index in order])
    assert (order[shuffled] == nearest_pieces(pieces, vocabulary)).all()


@given(st.binary(), st.binary())
def test_strings_are_equal_only_if_bytes_are(one, other):
    assert (characters(one) == characters(other)) == (one == other)
    assert characters(one).encode("utf-8", "surrogateescape") == one


@given(st.text())
def test_text_is_compared_as_text(text):
    assert characters(text.encode()) == text


def test_a_character_that_is_missing_goes_to_its_first_byte():
    missing = "日".encode()
    vocabulary = [b"a", "é".encode(), *(bytes([byte]) for byte in range(0x80, 0x100))]
    assert vocabulary[nearest_pieces([missing], vocabulary)[0]] == missing[:1]
