"""The definitions of alignment and projection read once more, row by row in plain Python, over bytes and
dictionaries.
"""

import math
from collections import defaultdict

import numpy as np
from random_captures import Capture, Side

from megatron_fuse.alignment import VocabularyMap
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans

Distribution = dict[int, float]


def plain_row(
    theirs: Side,
    capture: Capture,
    target: TokenSpans,
    response: bytes,
    vocabulary_map: VocabularyMap,
    unmatched: str,
    row: int,
) -> tuple[str, Distribution]:
    """How the target's row is aligned, and target token -> probability."""
    spans = capture.source.spans
    start, label = int(target.starts[row]), int(target.tokens[row])
    place, inside = find(spans, target, row)
    if place is None or (inside and unmatched == "skip"):
        return "skip", {}
    if inside and unmatched == "onehot":
        return "onehot", {label: 1.0}
    pieces = theirs.tokenizer.token_bytes
    mass = {i: math.exp(capture.logp_t[place][i]) for i in capture.stored[place] if i < len(pieces)}
    first, consumed = int(spans.tokens[place]), b""
    if inside:
        white = theirs.separator.encode() if spans.flags[place] & SpanFlag.LEADING else b""
        consumed = white + response[int(spans.starts[place]) : start]
        tail = 1 - sum(mass.values())
        begin = {i: p for i, p in mass.items() if pieces[i].startswith(consumed)}
        known = sum(begin.values())
        if known == 0 or known < tail:
            return "skip", {}
        mass = {i: p / known for i, p in begin.items() if pieces[i] != consumed}
        own = mass.get(first, 0.0)
    else:
        own = math.exp(capture.logp_t[place][first])
    share = label_share(theirs, capture, response, place, int(target.ends[row]))
    result: dict[int, float] = defaultdict(float)
    result[label] += own * share
    for token, probability in mass.items():
        if inside:
            to = int(vocabulary_map.remainder(np.array([token]), np.array([len(consumed)]))[0])
        else:
            leads = 2 * bool(spans.flags[place] & SpanFlag.LEADING) + bool(
                target.flags[row] & SpanFlag.LEADING
            )
            to = int(vocabulary_map.table()[leads, token])
        if to >= 0:
            result[to] += probability * (1 - share if token == first else 1)
    result = {token: p for token, p in result.items() if p > 0}
    return ("condition" if inside else "exact") if result else "skip", result


def find(source: TokenSpans, target: TokenSpans, row: int) -> tuple[int | None, bool]:
    """The source's row for a target row, and whether the target's token begins inside that row's token."""
    start = target.starts[row]
    same = [i for i, s in enumerate(source.starts) if s == start]
    around = [i for i, (s, e) in enumerate(zip(source.starts, source.ends, strict=True)) if s < start < e]
    if same:
        behind = sum(s == start for s in target.starts[row + 1 :])
        place = same[max(len(same) - 1 - int(behind), 0)]
    elif around:
        place = around[-1]
    else:
        return None, False
    flags = source.flags[place], target.flags[row]
    if any(f & SpanFlag.LOSSY for f in flags) or (flags[0] ^ flags[1]) & SpanFlag.STOP:
        return None, False
    return place, not same


def label_share(theirs: Side, capture: Capture, response: bytes, place: int, end: int) -> float:
    """f of the first source token: 0 where the label does not go on beyond it."""
    spans, pieces = capture.source.spans, theirs.tokenizer.token_bytes
    if not spans.starts[place] < spans.ends[place] < end:
        return 0.0
    f, row = 1.0, place + 1
    while row < len(spans) and spans.starts[row] < end:
        came = int(spans.tokens[row])
        if spans.flags[row] & SpanFlag.LOSSY:
            return 0.0
        if spans.ends[row] <= end:
            f *= math.exp(capture.logp_1[row][came])
        else:
            left = response[int(spans.starts[row]) : end]
            known = {
                i for i in {*capture.stored[row], came} if i < len(pieces) and pieces[i].startswith(left)
            }
            f *= sum(math.exp(capture.logp_1[row][i]) for i in known)
        row += 1
    return f
