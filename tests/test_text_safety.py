"""User text that is printed holds nothing that a terminal would obey."""

import unicodedata

import pytest

from megatron_fuse.text_safety import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),  # clears the screen
        ("\x9b31m", r"\x9b31m"),  # the one-byte form of ESC [
        ("\x00\x07\x08\x7f", r"\x00\x07\x08\x7f"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\u202eevil\u2066x\u200f\u061c", r"\u202eevil\u2066x\u200f\u061c"),
        ("a\u200bb\ufeffc\u200d\u2060", r"a\u200bb\ufeffc\u200d\u2060"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\ud800x\udfff", r"\ud800x\udfff"),
        ("\U000e0041", r"\U000e0041"),  # an invisible tag
        ("Grüße, 你好 \u00a0 \u3000 👍 e\u0301 \\x1b", "Grüße, 你好 \u00a0 \u3000 👍 e\u0301 \\x1b"),
        ("", ""),
    ],
)
def test_unsafe_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_prose_keeps_lines_and_joiners_alone() -> None:
    assert printable("a\n\tb\r\x1b\u202e\u200b", prose=True) == "a\n\tb\\r\\x1b\\u202e\\u200b"
    assert printable("👩\u200d🚀 می\u200cخواهم\n", prose=True) == "👩\u200d🚀 می\u200cخواهم\n"


def test_no_code_point_escapes_the_rule() -> None:
    everything = "".join(map(chr, range(0x110000)))
    shown = printable(everything)
    shown.encode("utf-8")
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    kept = set(printable(everything, prose=True)) - set(shown)
    assert kept == {"\n", "\t", "\u200c", "\u200d"}
