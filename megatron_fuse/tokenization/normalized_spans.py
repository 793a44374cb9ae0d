"""Finds the places of a normalised text's tokens in the text itself, without guessing unknown boundaries.

For example, T5's tokenizer turns newlines into spaces and `½` into `1⁄2` before it splits the text. A
normaliser works on chunks of the text: one character, a letter with its accents, a run of white space. A
token boundary between two chunks has a place in the text. A boundary inside a chunk has no place, unless the
chunk stays as it is.
"""

import re
import unicodedata
from collections.abc import Callable

import numpy as np

from megatron_fuse import ragged


def trace(text: str, normalize: Callable[[str], str]) -> tuple[str, np.ndarray]:
    """The outcome of the normaliser for a text, and the origin of each byte of the outcome.

    Returns the outcome, with m bytes, and origin int64 [m + 1], not decreasing: byte j of the outcome was
    made from the chunk of the text that begins at byte origin[j]. origin[m] is the text's length in bytes. A
    chunk that stays as it is counts as chunks of one byte each.
    The offsets of the libraries are not used: they are wrong if a character at the beginning is dropped.
    Instead the normaliser runs on the whole text, and on every small part alone. As long as the concatenated
    outcomes of the parts agree with the outcome of the whole, from the front or from the back, each part is a
    chunk. The rest in between is one chunk.
    """
    whole = normalize(text)
    parts = _parts(text, normalize)
    outcome_of = {part: normalize(part) for part in set(parts)}
    outcomes = [outcome_of[part] for part in parts]
    # Parts before `front` and from `back` on agree with the whole;
    # `front_end` and `back_start` are in the outcome.
    front, front_end = 0, 0
    while front < len(parts) and whole.startswith(outcomes[front], front_end):
        front_end += len(outcomes[front])
        front += 1
    back, back_start = len(parts), len(whole)
    while back > front and whole.endswith(outcomes[back - 1], front_end, back_start):
        back -= 1
        back_start -= len(outcomes[back])
    if back > front or back_start > front_end:
        left, right = "".join(parts[:front]), "".join(parts[back:])
        # If the front or the back gives another outcome by itself,
        # the parts agreed by chance: all is one chunk.
        if normalize(left) != whole[:front_end] or normalize(right) != whole[back_start:]:
            return whole, _origin([text], [whole])
        parts[front:back] = ["".join(parts[front:back])]
        outcomes[front:back] = [whole[front_end:back_start]]
    return whole, _origin(parts, outcomes)


def _parts(text: str, normalize: Callable[[str], str]) -> list[str]:
    """The text split into characters, each with the marks after it, and into runs of blanks.

    A blank is a character that becomes white space or nothing.
    """
    blank = {" "} | {character for character in set(text) if not normalize(character).strip()}
    marks = {"\u0300"} | {character for character in set(text) if unicodedata.category(character)[0] == "M"}
    blanks, joined = ("".join(map(re.escape, characters)) for characters in (blank - marks, marks))
    return re.findall(f"[{blanks}]+|[^{blanks}][{joined}]*", text)


def _origin(parts: list[str], outcomes: list[str]) -> np.ndarray:
    sizes = np.array([len(part.encode()) for part in parts], np.int64)
    lengths = np.array([len(outcome.encode()) for outcome in outcomes], np.int64)
    same = np.array([part == outcome for part, outcome in zip(parts, outcomes, strict=True)], bool)
    within = np.arange(lengths.sum()) - np.repeat(ragged.offsets(lengths)[:-1], lengths)
    starts = ragged.offsets(sizes)
    origin = np.repeat(starts[:-1], lengths) + within * np.repeat(same, lengths)
    return np.append(origin, starts[-1])


def covered(starts: np.ndarray, ends: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the text, as whole chunks, that became the tokens' bytes [start, end) in the outcome.

    starts, ends int64 [n]; origin as in `trace`. The results of two tokens of one chunk overlap.
    """
    last = origin[np.maximum(ends - 1, starts)]
    behind = np.minimum(np.searchsorted(origin, last, side="right"), len(origin) - 1)
    return origin[starts], origin[behind]


def settle(starts: np.ndarray, ends: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Turns the tokens' bytes in a text of `size` bytes, which overlap if tokens share a chunk, into spans.

    The spans cover the text without overlap. starts, ends int64 [n].
    Returns ends int64 [n], not decreasing, the last one `size`, and shared bool [n]. The boundary after a
    token is known if no token up to it ends after the beginning of a later token. A group of tokens without
    known boundaries between them is `shared`: its last token covers the whole group, and the other tokens are
    empty, at the beginning of the group. So no place inside the group is claimed. Bytes that no token covers,
    because the normaliser dropped them, go to a neighbour.
    """
    count = len(ends)
    reached = np.maximum.accumulate(ends)
    needed = np.minimum.accumulate(starts[::-1])[::-1]
    known = np.append(reached[:-1] <= needed[1:], True)[:count]
    boundaries = np.concatenate([[0], reached[:-1], [size]])  # [n + 1]: before the first, then after each
    # For each token, the last known boundary up to its end.
    before = np.maximum.accumulate(np.where(known, np.arange(1, count + 1), 0))
    shared = ~known | ~np.append(True, known[:-1])[:count]
    return boundaries[before], shared
