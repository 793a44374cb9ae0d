"""Texts where tokenizers differ, for property tests."""

from hypothesis import strategies as st

# Runs of spaces, combining marks, U+2581 itself, NUL, special strings, broken words
_FRAGMENTS = [
    " ",
    "  ",
    "     ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "e\u0301",
    "é",
    "▁",
    "😀",
    "日本",
    "</s>",
    "<|endoftext|>",
    "<0x41>",
]
_FRAGMENTS += [
    "12345",
    "ization",
    " international",
    "Sure",
    "<s>",
    "\u00a0",
    "\ufeff",
    "<|im_end|>",
    "hello",
    " world's",
]
# What NFKC makes longer (ligature, kiloton square, Roman digit), shorter (Jamo) or what it drops (a control,
# ZWSP)
_FRAGMENTS += ["ﬁ", "㌔", "Ⅷ", "½", "\u1100\u1161\u11a8", "\x01", "\u200b", "ｈｅｌｌｏ", "ſ"]
# Sequences of several characters that are one on the screen
_FRAGMENTS += [
    "👩\u200d👩\u200d👧",
    "🇫🇷",
    "👍🏽",
    "❤\ufe0f",
    "x\u0301\u0302",
    "ที่",
    "क्षि",
    "لَا",
    "한국",
    "ABCdefGHI",
    "McDonald'S",
]
SCRIPTS = st.one_of(
    st.text(max_size=6),
    st.text("".join(map(chr, range(0x0E01, 0x0E5C))), max_size=5),  # Thai (some places are unassigned)
    st.text("".join(map(chr, range(0x0620, 0x0670))), max_size=5),  # Arabic
    st.text("".join(map(chr, range(0x0901, 0x0970))), max_size=5),  # Devanagari
    st.text("".join(map(chr, range(0x4E00, 0x4F00))), max_size=5),  # Chinese characters
    st.text("".join(map(chr, range(0x1F300, 0x1F650))), max_size=3),  # beyond 16 bits
    st.text("0123456789 ", max_size=9),
)
TEXTS = st.lists(st.one_of(st.sampled_from(_FRAGMENTS), SCRIPTS), max_size=8).map("".join)
