"""The other half of road_reference.py: what a source's rows say about the target's tokens, one row at a
time.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

from road_reference import Conversation, Row, Side, Token


@dataclass
class Rules:
    """vocabulary_map and unmatched as in a recipe; same_vocabulary: both sides have the same ids."""

    vocabulary_map: str
    unmatched: str
    same_vocabulary: bool


@dataclass
class Pair:
    """A conversation as the source has read it, with its rows, and as the target is to read it."""

    source: Side
    target: Side
    theirs: Conversation
    ours: Conversation
    rows: list[Row]
    rules: Rules


Mass = dict[int, float]
"""Target token -> probability."""


def teacher_row(pair: Pair, number: int) -> tuple[str, Mass]:
    """How the target's supervised token of this number is matched, and what a document holds there."""
    label, place = pair.ours.tokens[number], aligned(pair.theirs, pair.ours, number)
    within = [i for i, token in enumerate(pair.theirs.tokens) if token.begin < label.begin < token.end]
    row = place if place is not None else within[0] if within else None
    match, mass = "skip", {}
    if label.lossy or row is None or pair.theirs.tokens[row].lossy:
        pass  # bytes that one of the two has not read have no KL
    elif place is not None:
        match, mass = "exact", projected(pair, place, label)
    elif pair.rules.unmatched == "onehot":
        match, mass = "onehot", {label.id: 1.0}
    elif pair.rules.unmatched == "condition":
        match, mass = "condition", conditioned(pair, row, label)
    return (match, mass) if mass else ("skip", {})


def aligned(theirs: Conversation, ours: Conversation, number: int) -> int | None:
    """The source's row that has read the same bytes; of several that have, counted from the last
    backwards.
    """
    begin = ours.tokens[number].begin
    same = [i for i, token in enumerate(theirs.tokens) if token.begin == begin]
    later = sum(token.begin == begin for token in ours.tokens[number + 1 :])
    return same[max(len(same) - 1 - later, 0)] if same else None


def projected(pair: Pair, place: int, label: Token) -> Mass:
    """The source's row at this place, at which both have read the same bytes."""
    row, first = pair.rows[place], pair.theirs.tokens[place]
    share = 0.0
    mass: Mass = defaultdict(float)
    if pair.rules.vocabulary_map == "exact" and label.begin < first.end < label.end:
        share = label_share(pair, place, label.end)
    if share:
        mass[label.id] += math.exp(row.logp_t[first.id]) * share
    for entry in row.stored:
        to = target_token(pair, entry, first.leads, label.leads)
        if to is not None:
            mass[to] += math.exp(row.logp_t[entry]) * (1 - share if entry == first.id else 1)
    return mass


def conditioned(pair: Pair, place: int, label: Token) -> Mass:
    """The source's row at this place, inside whose token the label begins, given the bytes of it that have
    been read.
    """
    row, first = pair.rows[place], pair.theirs.tokens[place]
    read = pair.theirs.text[first.begin : label.begin]
    # An id that is no token's, of a model's further columns of logits, says nothing: its mass is the tail's.
    chance = {entry: math.exp(row.logp_t[entry]) for entry in row.stored if entry < len(pair.source.pieces)}
    fitting = {}
    for entry in chance:
        piece = known_bytes(pair.source, entry, first.leads)
        if piece is not None and piece.startswith(read):
            fitting[entry] = piece[len(read) :]
    total = sum(chance[entry] for entry in fitting)
    if not fitting or total < 1 - sum(chance.values()):
        return {}
    split = pair.rules.vocabulary_map == "exact" and first.id in fitting and first.end < label.end
    share = label_share(pair, place, label.end) if split else 0.0
    mass: Mass = defaultdict(float)
    if share:
        mass[label.id] += chance[first.id] / total * share
    for entry, rest in fitting.items():
        to = piece_for(pair, rest) if rest else None
        if to is not None:
            mass[to] += chance[entry] / total * (1 - share if entry == first.id else 1)
    return mass


def label_share(pair: Pair, place: int, end: int) -> float:
    """f: how likely the source goes on after its token at `place` as the label does, which ends at byte
    `end`.
    """
    f = 1.0
    for token, row in zip(pair.theirs.tokens[place + 1 :], pair.rows[place + 1 :], strict=True):
        if token.begin >= end:
            break
        if token.lossy:
            return 0.0  # it is not known how likely its bytes were
        if token.end <= end:
            f *= math.exp(row.logp_1[token.id])
            continue
        left = pair.theirs.text[token.begin : end]
        known = {*row.stored, token.id}
        f *= sum(math.exp(row.logp_1[i]) for i in known if (bytes_of(pair.source, i) or b"").startswith(left))
    return f


# --- from token to token
# ----------------------------------------------------------------------------------------------------


def bytes_of(side: Side, token: int) -> bytes | None:
    # A model has more logits than its tokenizer ids.
    return side.pieces[token] if token < len(side.pieces) else None


def known_bytes(source: Side, token: int, leads: bool) -> bytes | None:
    """What an entry says about the answer's bytes: a first token begins in the template's white space."""
    piece = bytes_of(source, token)
    if piece is None or not leads:
        return piece
    if source.separator.startswith(piece):
        return None  # only white space is known, not what the answer begins with
    return piece.removeprefix(source.separator)


def target_token(pair: Pair, token: int, source_leads: bool, target_leads: bool) -> int | None:
    source, target = pair.source, pair.target
    if token == source.stop:
        return target.stop
    same_state = not source_leads and not target_leads
    same_state |= source_leads and target_leads and source.separator == target.separator
    if (
        pair.rules.same_vocabulary
        and token < len(source.pieces)
        and (same_state or source.pieces[token] is None)
    ):
        return token
    piece = bytes_of(source, token) if same_state else known_bytes(source, token, source_leads)
    if piece is None:
        return None
    if target_leads and not same_state:
        piece = target.separator + piece
    return piece_for(pair, piece)


def piece_for(pair: Pair, text: bytes) -> int | None:
    """The target token that stands for these bytes by the map's rule."""
    return (equal_piece if pair.rules.vocabulary_map == "em" else first_piece)(pair.target, text)


@cache
def equal_piece(target: Side, text: bytes) -> int | None:
    """The target token of these bytes; of several the one that the target itself cuts from them, else the
    first.
    """
    own, equal = own_cut(target, text), [i for i, piece in enumerate(target.pieces) if piece == text]
    if not equal:
        return None
    return own[0] if own[:1] and own[0] in equal else equal[0]


@cache
def first_piece(target: Side, text: bytes) -> int | None:
    """The target token of these bytes, else the first that the target cuts off them, else the longest they
    begin with.
    """
    equal = equal_piece(target, text)
    if equal is not None:
        return equal
    own = own_cut(target, text)
    piece = target.pieces[own[0]] if own else None
    if piece and text.startswith(piece):  # it is neither the unknown token nor a space for a U+2581
        return own[0]
    longest = max(
        (piece for piece in target.pieces if piece and text.startswith(piece)), key=len, default=None
    )
    return None if longest is None else first_piece(target, longest)


def own_cut(target: Side, text: bytes) -> list[int]:
    try:
        return target.cut(text.decode())
    except UnicodeDecodeError:
        return []
