"""A target row that begins inside a source token takes the source's distribution given the bytes read."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from plain_projection import find, label_share
from random_captures import as_dicts, map_between, random_capture, small, small_side

from megatron_fuse.alignment import MATCHES, Rows, project_responses
from megatron_fuse.alignment.conditioning import begin_alike
from megatron_fuse.tokenization.spans import SpanFlag, response_bytes

TURNS = ["12 internationalization stations", "345 été, 日本 the station 678", "🙂 hello hello"]


# White space before the response, so that it is part of a first token that the target's second row begins
# inside of.
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("byte_level", " "), ("sentencepiece", "")),
        (("byte_level", ""), ("sentencepiece", " ")),
        (("crossing", " "), ("llama_json", " ")),
        (("llama_metaspace", " "), ("crossing", "")),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_dense_distribution(theirs, ours, temperature, seed):
    """With every token of any probability stored: enumerate them all, keep those that begin so,
    renormalise.
    """
    theirs, ours = small_side(*theirs), small_side(*ours)
    target, vocabulary_map, response = ours.spans(TURNS), map_between(theirs, ours), response_bytes(TURNS)
    capture = random_capture(seed, theirs, theirs.spans(TURNS), keep=200, temperature=temperature, dense=True)
    rows, match, _ = project_responses(capture.source, target, vocabulary_map, unmatched="condition")
    got, spans, pieces = as_dicts(rows), capture.source.spans, theirs.tokenizer.token_bytes
    checked = 0
    for row in np.flatnonzero(match == MATCHES.index("condition")):
        place, inside = find(spans, target, row)
        assert inside
        read = response[spans.starts[place] : target.starts[row]]
        if spans.flags[place] & SpanFlag.LEADING:
            read = theirs.separator.encode() + read
        dense = {i: math.exp(lp) for i, lp in capture.logp_t[place].items() if i < len(pieces)}
        total = sum(p for i, p in dense.items() if pieces[i].startswith(read))
        share = label_share(theirs, capture, response, place, target.ends[row])
        came, wanted = int(spans.tokens[place]), defaultdict(float)
        wanted[int(target.tokens[row])] += share * dense[came] / total
        for token, p in dense.items():
            if pieces[token].startswith(read) and pieces[token] != read:
                to = int(vocabulary_map.remainder(np.array([token]), np.array([len(read)]))[0])
                wanted[to] += p / total * (1 - share if token == came else 1)
        assert -1 not in wanted  # every byte has a token here: only what ends at the boundary is lost
        assert got[row] == pytest.approx({i: p for i, p in wanted.items() if p > 0}, rel=1e-4, abs=1e-9), row
        ended = sum(p for i, p in dense.items() if pieces[i] == read) / total
        assert sum(got[row].values()) + ended == pytest.approx(1, abs=1e-6)
        checked += 1
    assert checked


def project(stored: dict[int, float], separator: str = "") -> tuple[list[dict[int, float]], list[str]]:
    """`12` of the source, whose first row holds these entries, on `1` `2` of the target."""
    theirs, ours = small_side("byte_level", separator), small_side("sentencepiece", "")
    source, target = theirs.spans(["12"]), ours.spans(["12"])
    assert (source.ends.tolist(), target.ends.tolist()) == ([2, 3], [1, 2, 3])
    capture = random_capture(0, theirs, source, keep=1, temperature=2.0).source
    capture = replace(
        capture,
        rows=Rows(
            np.array([len(stored), 0], np.uint8),
            np.array(list(stored), np.int32),
            np.log(list(stored.values())).astype(np.float32),
        ),
    )
    rows, match, _ = project_responses(capture, target, map_between(theirs, ours), unmatched="condition")
    return as_dicts(rows), [MATCHES[code] for code in match]


def theirs(text: str) -> int:
    """The token of the text."""
    (token,) = small("byte_level").encode_continuation(text)
    return token


def ours(text: str) -> int:
    """Its first token of the text."""
    return small("sentencepiece").encode_continuation(text)[0]


def test_tokens_that_end_at_the_boundary_join_the_tail():
    rows, match = project({theirs("12"): 0.3, theirs("sure"): 0.3, theirs("1"): 0.2})
    assert match[:2] == ["exact", "condition"]
    assert rows[0] == pytest.approx({ours("1"): 0.5, ours("sure"): 0.3}, rel=1e-5)
    assert rows[1] == pytest.approx({ours("2"): 0.3 / 0.5}, rel=1e-5)


def test_the_white_space_in_front_counts_as_read():
    rows, match = project({theirs(" 12"): 0.4, theirs(" 123"): 0.2, theirs("12"): 0.3}, separator=" ")
    assert match[:2] == ["exact", "condition"]
    assert rows[1] == pytest.approx({ours("2"): 1.0}, rel=1e-5)


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"12": 0.3, "sure": 0.41}, "condition"),  # 0.3 known, 0.29 in the tail
        ({"12": 0.3, "sure": 0.39}, "skip"),  # 0.31 in the tail: most of what begins so may be unknown
        ({"sure": 1.0}, "skip"),  # nothing begins so
        ({"1": 1.0}, "skip"),  # everything known ends at the boundary
        ({}, "skip"),
    ],
)
def test_rows_of_which_too_little_is_known_are_skipped(stored, kind):
    rows, match = project({theirs(text): p for text, p in stored.items()})
    assert match[1] == kind
    assert rows[1] == pytest.approx({ours("2"): 1.0} if kind == "condition" else {}, rel=1e-5)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_begin_alike_is_startswith(kind):
    tokenizer, rng = small(kind), np.random.default_rng(0)
    ids, tokens = rng.integers(0, tokenizer.vocab_size, (2, 4000))
    ids[::4] = tokens[::4]
    tokens[::50], ids[::100] = tokenizer.token_bytes.index(b"\0"), tokenizer.eos_id  # a zero is not an end
    lengths = np.minimum(rng.integers(0, 5, 4000), tokenizer.byte_lengths[tokens])
    wanted = [
        tokenizer.token_bytes[i].startswith(tokenizer.token_bytes[t][:n])
        for i, t, n in zip(ids.tolist(), tokens.tolist(), lengths.tolist(), strict=True)
    ]
    assert begin_alike(tokenizer, ids, tokens, lengths).tolist() == wanted
    assert begin_alike(tokenizer, ids[:0], tokens[:0], lengths[:0]).tolist() == []
