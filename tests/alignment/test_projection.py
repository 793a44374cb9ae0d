"""Mass is conserved: what meets adds up, what cannot be mapped joins the tail, and every row is what its
definition says.
"""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from plain_projection import find, plain_row
from random_captures import as_dicts, join, map_between, random_capture, small_side

from megatron_fuse.alignment import MATCHES, Rows, SourceRows, project_responses
from megatron_fuse.alignment.rows import Entries, merge_entries
from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans, response_bytes

SEEDS = range(8)
CONVERSATIONS = [
    ["sure, the internationalization of 12 stations", " 345 été"],
    ["user hello café 日本 été nation, then\n  12  x 345", "", "🙂🙂 internationalization station"],
    ["x"],
    ["123 internationalizations \n\n    cafe\u0301 ▁ </s> مرحبا"],
]


def flag_some(rng: np.random.Generator, spans: TokenSpans, share: float) -> TokenSpans:
    """Some rows as if their bytes were not the response's."""
    flags = np.where(rng.random(len(spans)) < share, SpanFlag.LOSSY, 0) * (~spans.has(SpanFlag.STOP))
    return replace(spans, flags=spans.flags | flags.astype(np.uint8))


# Ours cut more finely than theirs and less; white space before the response on either side, on both, on none.
PAIRS = [
    (("byte_level", ""), ("sentencepiece", " ")),
    (("sentencepiece", " "), ("crossing", "")),
    (("crossing", "\n"), ("llama_json", " ")),
    (("llama_metaspace", " "), ("sentencepiece", " ")),
    (("crossing", ""), ("tiktoken", "")),
]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize("unmatched", ["skip", "condition", "onehot"])
@pytest.mark.parametrize(("keep", "temperature", "lossy"), [(4, 1.0, 0.0), (60, 2.0, 0.0), (60, 2.0, 0.15)])
def test_every_row_is_what_its_definition_says(theirs, ours, unmatched, keep, temperature, lossy):
    theirs, ours = small_side(*theirs), small_side(*ours)
    rng = np.random.default_rng(keep)
    ends = [n != 2 for n in range(len(CONVERSATIONS))]  # one response was cut off
    both = [
        [side.spans(c, stop=s) for c, s in zip(CONVERSATIONS, ends, strict=True)] for side in (theirs, ours)
    ]
    source, target = (flag_some(rng, join(parts, CONVERSATIONS), lossy) for parts in both)
    capture = random_capture(keep, theirs, source, keep=keep, temperature=temperature)
    vocabulary_map = map_between(theirs, ours)
    rows, match, _ = project_responses(capture.source, target, vocabulary_map, unmatched=unmatched)
    types = (rows.counts.dtype, rows.ids.dtype, rows.logprobs.dtype, match.dtype)
    assert types == (np.uint8, np.int32, np.float32, np.uint8)
    assert rows.kept().max() <= 1 + 1e-6
    response = b"".join(map(response_bytes, CONVERSATIONS))
    kinds: Counter[str] = Counter()
    for row, got in enumerate(as_dicts(rows)):
        kind, wanted = plain_row(theirs, capture, target, response, vocabulary_map, unmatched, row)
        assert (MATCHES[match[row]], got) == (kind, pytest.approx(wanted, rel=1e-5, abs=1e-30)), row
        assert list(got.values()) == sorted(got.values(), reverse=True), row
        kinds[kind] += 1
    assert kinds["exact"] and kinds[unmatched]


def test_the_conversations_hold_the_hard_cases():
    """Labels of several source tokens, labels that end inside a source token, both also of rows that begin
    inside one.
    """
    seen: Counter[tuple[bool, bool]] = Counter()
    for names in PAIRS:
        theirs, ours = (join([small_side(*n).spans(c) for c in CONVERSATIONS], CONVERSATIONS) for n in names)
        for row, end in enumerate(ours.ends):
            place, inside = find(theirs, ours, row)
            if place is not None and theirs.ends[place] < end:
                seen[inside, end not in theirs.ends] += 1
    assert len(seen) == 4, seen


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shard_is_its_examples_one_after_the_other(seed):
    """Bit for bit, whatever the others hold: masked tokens, rows without entries, no rows on one side or
    on both.
    """
    rng = np.random.default_rng(seed)
    theirs, ours = small_side("tiktoken", ""), small_side("sentencepiece", " ")
    vocabulary_map = map_between(theirs, ours)
    nothing = TokenSpans.join([], [])
    parts, projected = [], []
    for number, turns in enumerate(rng.permutation(np.array(CONVERSATIONS, object))):
        source = nothing if number == seed % 5 else theirs.spans(turns)
        target = nothing if number == seed % 3 else ours.spans(turns)
        capture = random_capture(seed, theirs, source, keep=12, temperature=2.0).source
        masked = rng.random(len(source)) < 0.1
        logprobs = np.where(masked, rng.choice([-np.inf, np.finfo(np.float32).min]), capture.token_logprobs)
        capture = replace(capture, token_logprobs=logprobs)
        parts.append((capture, source, target, turns))
        projected.append(project_responses(capture, target, vocabulary_map, unmatched="condition"))
    captures, sources, targets, turns = zip(*parts, strict=True)
    fields = ("token_logprobs", "logsumexp", "logsumexp_temperature")
    whole = SourceRows(
        theirs.tokenizer,
        join(sources, turns),
        Rows(
            *(np.concatenate([getattr(c.rows, n) for c in captures]) for n in ("counts", "ids", "logprobs"))
        ),
        2.0,
        *(np.concatenate([getattr(c, name) for c in captures]) for name in fields),
    )
    rows, match, _ = project_responses(whole, join(targets, turns), vocabulary_map, unmatched="condition")
    for name in ("counts", "ids", "logprobs"):
        assert np.array_equal(
            getattr(rows, name), np.concatenate([getattr(r, name) for r, *_ in projected])
        ), f"{seed=}"
    assert np.array_equal(match, np.concatenate([m for _, m, _ in projected]))


@pytest.mark.parametrize("kind", ["em", "mined"])
@pytest.mark.parametrize("unmatched", ["skip", "condition", "onehot"])
def test_other_vocabulary_maps_conserve_mass_too(kind, unmatched):
    theirs, ours = small_side("byte_level", ""), small_side("sentencepiece", " ")
    source, target = (join([side.spans(c) for c in CONVERSATIONS], CONVERSATIONS) for side in (theirs, ours))
    capture = random_capture(1, theirs, source, keep=200, temperature=2.0)
    rows, match, _ = project_responses(
        capture.source, target, map_between(theirs, ours, kind=kind), unmatched=unmatched
    )
    assert rows.kept().max() <= 1 + 1e-6
    assert np.array_equal(match == MATCHES.index("skip"), rows.counts == 0)
    assert np.array_equal(rows.kept()[match == MATCHES.index("onehot")], np.ones((match == 3).sum()))


@pytest.mark.parametrize("seed", SEEDS)
def test_merging_agrees_with_a_dictionary(seed):
    rng = np.random.default_rng(seed)
    places = np.sort(rng.integers(0, 9, 70))
    ids = rng.integers(-1, 7, 70).astype(np.int32)
    logprobs = np.where(rng.random(70) < 0.1, -np.inf, np.round(rng.normal(-3, 1, 70) * 4) / 4)
    expected: list[dict[int, float]] = [{} for _ in range(11)]
    for row, token, logprob in zip(places, ids.tolist(), logprobs, strict=True):
        if token >= 0 and logprob > -np.inf:
            expected[row][token] = expected[row].get(token, 0.0) + math.exp(logprob)
    got = as_dicts(merge_entries(Entries(places, ids, logprobs), 11))
    assert got == [pytest.approx(row, rel=1e-6) for row in expected], f"{seed=}"
    for row, wanted in zip(got, expected, strict=True):
        assert list(row.values()) == sorted(row.values(), reverse=True)
        alone = [token for token in wanted if np.exp(np.float32(np.log(wanted[token]))) == row[token]]
        ties = [token for token in row if token in alone and list(row.values()).count(row[token]) > 1]
        order = [token for token in wanted if token in ties]  # in which they came
        assert sorted(ties, key=lambda token: (-row[token], order.index(token))) == ties, f"{seed=}"


@pytest.mark.parametrize("seed", SEEDS)
def test_kept_mass_is_the_captured_mass_where_everything_is_mapped(seed):
    """Within 1e-6, of 255 entries that meet on three tokens."""
    rng = np.random.default_rng(seed)
    places = np.repeat(np.arange(20), 255)
    mass = rng.dirichlet(np.full(255, 0.3), 20).ravel() * np.repeat(rng.random(20), 255)
    entries = Entries(
        places, rng.integers(0, 3, len(places)).astype(np.int32), np.log(np.maximum(mass, 1e-300))
    )
    merged = merge_entries(entries, 20)
    assert np.abs(merged.kept() - np.bincount(places, mass)).max() < 1e-6, f"{seed=}"
    assert merged.counts.max() <= 3


def test_nothing_to_project():
    side = small_side("byte_level", "")
    nothing = TokenSpans.join([], [])
    vocabulary_map = map_between(side, side)
    for source, target in (
        (nothing, side.spans(["sure"])),
        (side.spans(["sure"]), nothing),
        (nothing, nothing),
    ):
        capture = random_capture(0, side, source, keep=3, temperature=1.0)
        rows, match, _ = project_responses(capture.source, target, vocabulary_map, unmatched="condition")
        assert rows.counts.tolist() == match.tolist() == [0] * len(target)
        assert len(rows.ids) == 0


def test_bad_input():
    side = small_side("byte_level", "")
    with pytest.raises(ValueError, match="counts add up to 3, but there are 2 ids"):
        Rows(np.array([3], np.uint8), np.zeros(2, np.int32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        Rows(np.array([1], np.uint8), np.zeros(1, np.int32), np.full(1, np.nan, np.float32))
    capture = random_capture(0, side, side.spans(["sure"]), keep=3, temperature=1.0).source
    with pytest.raises(ValueError, match="2 spans, but 1 logsumexp"):
        replace(capture, logsumexp=capture.logsumexp[:1])
    with pytest.raises(UserError, match="'mean' is not allowed\. Set it to one of skip, condition, onehot"):
        project_responses(capture, side.spans(["sure"]), map_between(side, side), unmatched="mean")
    many = Entries(np.zeros(256, np.int64), np.arange(256, dtype=np.int32), np.full(256, -9.0))
    with pytest.raises(ValueError, match="256 entries, more than 255"):
        merge_entries(many, 1)
