"""Where the tokens of a normalised text lie in the text itself, claiming no boundary that is not known.

T5's tokenizer, say, turns newlines into spaces and `½` into `1⁄2` before it cuts. A normaliser works on chunks of the text
(one character, a letter with its accents, a run of white space). A token boundary between two chunks has a place in the
text; one inside a chunk has none, unless the chunk stays as it is.
"""

import re
import unicodedata
from collections.abc import Callable

import numpy as np


def trace(text: str, normalize: Callable[[str], str]) -> tuple[str, np.ndarray]:
    """What the normaliser makes of a text, and where from.

    Returns the outcome and origin int64 [m + 1], not decreasing: byte j of the outcome's m was made from the chunk of the
    text that begins at byte origin[j]; origin[m] is the text's length in bytes. A chunk that stays as it is counts as
    chunks of one byte.
    The libraries' own record is not used: it goes wrong where a character at the beginning is dropped. The normaliser
    is asked for the whole and for every small part alone. Wherever the outcomes of parts on end, counted from the front
    or from the back, are those of the whole, each part is a chunk; whatever is left in between is one chunk.
    """
    whole = normalize(text)
    parts = _parts(text, normalize)
    outcome_of = {part: normalize(part) for part in set(parts)}
    outcomes = [outcome_of[part] for part in parts]
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
        if normalize(left) != whole[:front_end] or normalize(right) != whole[back_start:]:
            return whole, _origin([text], [whole])  # alike by chance
        parts[front:back] = ["".join(parts[front:back])]
        outcomes[front:back] = [whole[front_end:back_start]]
    return whole, _origin(parts, outcomes)


def _parts(text: str, normalize: Callable[[str], str]) -> list[str]:
    """The text cut into characters, each with the marks behind it, and into runs of what becomes white space or nothing."""
    blank = {" "} | {character for character in set(text) if not normalize(character).strip()}
    marks = {"\u0300"} | {character for character in set(text) if unicodedata.category(character)[0] == "M"}
    blanks, joined = ("".join(map(re.escape, characters)) for characters in (blank - marks, marks))
    return re.findall(f"[{blanks}]+|[^{blanks}][{joined}]*", text)


def _origin(parts: list[str], outcomes: list[str]) -> np.ndarray:
    sizes = np.array([len(part.encode()) for part in parts], np.int64)
    lengths = np.array([len(outcome.encode()) for outcome in outcomes], np.int64)
    same = np.array([part == outcome for part, outcome in zip(parts, outcomes, strict=True)], bool)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    origin = np.repeat(np.cumsum(sizes) - sizes, lengths) + within * np.repeat(same, lengths)
    return np.append(origin, sizes.sum())


def covered(starts: np.ndarray, ends: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens' bytes in the outcome [start, end) -> bytes of the text that went into them, whole chunks.

    starts, ends int64 [n]; origin as in `trace`. Two tokens of one chunk come out overlapping.
    """
    last = origin[np.maximum(ends - 1, starts)]
    behind = np.minimum(np.searchsorted(origin, last, side="right"), len(origin) - 1)
    return origin[starts], origin[behind]


def settle(starts: np.ndarray, ends: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens' bytes in a text of `size` bytes, overlapping where they share a chunk -> spans that cover the text.

    starts, ends int64 [n]. Returns ends int64 [n], not decreasing, the last one `size`, and shared bool [n].
    The boundary behind a token is known where no token up to it reaches as far as a later one begins. A stretch of
    tokens without known boundaries between them is shared: all but its last are empty, at its beginning, and the last
    covers it, so that no place inside is claimed. What no token covers, because the normaliser dropped it, goes to a
    neighbour.
    """
    count = len(ends)
    reached = np.maximum.accumulate(ends)
    needed = np.minimum.accumulate(starts[::-1])[::-1]
    known = np.append(reached[:-1] <= needed[1:], True)[:count]
    boundaries = np.concatenate([[0], reached[:-1], [size]])  # [n + 1]: before the first token, then behind each
    before = np.maximum.accumulate(np.where(known, np.arange(1, count + 1), 0))  # the last known one up to each token
    shared = ~known | ~np.append(True, known[:-1])[:count]
    return boundaries[before], shared
