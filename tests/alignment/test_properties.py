"""Laws of alignment and projection, over random texts of many scripts and every kind of tokenizer."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_captures import (
    Side,
    as_dicts,
    conversations,
    map_between,
    random_capture,
    small_side,
    texts,
)
from small_tokenizers import KINDS, REAL

from megatron_fuse.alignment import (
    MATCHES,
    UNMATCHED,
    Rows,
    SourceRows,
    VocabularyMap,
    find_source_rows,
    project_responses,
)
from megatron_fuse.tokenization import load_tokenizer
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans

quick = settings(max_examples=40, deadline=None, database=None)

sides = st.builds(small_side, st.sampled_from([*KINDS, "crossing"]), st.sampled_from(["", " ", "\n"]))
seeds = st.integers(0, 2**32 - 1)
unmatched = st.sampled_from(UNMATCHED)


def both_spans(
    theirs: Side, ours: Side, turns: list[str], stop: bool = True
) -> tuple[TokenSpans, TokenSpans]:
    source, target = theirs.spans(turns, stop=stop), ours.spans(turns, stop=stop)
    assume(source is not None and target is not None)
    return source, target


def prefixes(side: Side, spans: TokenSpans) -> list[bytes]:
    """What each row has read of the responses: the tokens before it, without the templates' white space."""
    read, turn, result = b"", b"", []
    for token, flags in zip(spans.tokens.tolist(), spans.flags, strict=True):
        result.append(read + turn)
        if flags & SpanFlag.STOP:
            read, turn = read + turn + b"\0", b""
        elif flags & SpanFlag.LEADING:
            turn = side.tokenizer.token_bytes[token].removeprefix(side.separator.encode())
        else:
            turn += side.tokenizer.token_bytes[token]
    return result


@quick
@given(sides, sides, conversations, st.booleans())
def test_rows_are_matched_where_their_prefixes_decode_to_the_same_bytes(theirs, ours, turns, stop):
    source, target = both_spans(theirs, ours, turns, stop)
    row, inside = find_source_rows(source, target)
    read, reads = prefixes(theirs, source), prefixes(ours, target)
    for place, within, ours_read in zip(row.tolist(), inside.tolist(), reads, strict=True):
        if place >= 0 and not within:
            assert read[place] == ours_read
        else:
            assert ours_read not in read
            assert within  # both sides read the same bytes, so that every other start lies inside some token
            assert len(read[place]) < len(ours_read) and ours_read.startswith(read[place])


@quick
@given(sides, conversations, st.booleans(), unmatched, seeds)
def test_the_same_tokenizer_gives_the_capture_back_bit_for_bit(side, turns, stop, unmatched, seed):
    spans, _ = both_spans(side, side, turns, stop)
    capture = random_capture(seed, side, spans, keep=20, temperature=2.0).source
    rows, match, _ = project_responses(capture, spans, map_between(side, side), unmatched=unmatched)
    known = capture.rows.below(side.tokenizer.vocab_size)
    for name in ("counts", "ids", "logprobs"):
        assert np.array_equal(getattr(rows, name), getattr(known, name)), name
    assert np.array_equal(match, np.where(known.counts > 0, MATCHES.index("exact"), MATCHES.index("skip")))


@quick
@given(sides, sides, conversations, unmatched, seeds)
def test_a_permuted_target_vocabulary_gives_the_permuted_result(theirs, ours, turns, unmatched, seed):
    source, target = both_spans(theirs, ours, turns)
    capture = random_capture(seed, theirs, source, keep=20, temperature=2.0).source
    vocabulary_map = map_between(theirs, ours)
    size = ours.tokenizer.vocab_size
    permuted = np.append(np.random.default_rng(seed).permutation(size), -1).astype(np.int32)  # -1 stays -1
    names = ("ids", "leading", "source_leading", "both_leading", "remainder_ids")
    other_map = replace(vocabulary_map, **{name: permuted[getattr(vocabulary_map, name)] for name in names})
    rows, match, _ = project_responses(capture, target, vocabulary_map, unmatched=unmatched)
    others, other_match, _ = project_responses(
        capture, replace(target, tokens=permuted[target.tokens]), other_map, unmatched=unmatched
    )
    assert np.array_equal(permuted[rows.ids], others.ids)
    assert np.array_equal(rows.counts, others.counts) and np.array_equal(match, other_match)
    assert np.array_equal(rows.logprobs, others.logprobs)


@quick
@given(sides, conversations, seeds, st.data())
def test_a_token_split_in_two_keeps_the_mass_of_the_chain_rule(side, turns, seed, data):
    """A source that differs from the target in one token, which it writes as two: where the label is that
    token, it has p_T(first) p_1(second | first), the first half keeps the rest, and no other row is changed
    by a bit."""
    target, _ = both_spans(side, side, turns)
    token_bytes = side.tokenizer.token_bytes
    long = sorted({t for t in target.tokens.tolist() if len(token_bytes[t]) > 1 and t != side.stop})
    assume(long)
    token = data.draw(st.sampled_from(long), "token")
    at = data.draw(st.integers(1, len(token_bytes[token]) - 1), "cut after")
    first, second = len(token_bytes), len(token_bytes) + 1
    halves = [token_bytes[token][:at], token_bytes[token][at:]]
    temperature = data.draw(st.sampled_from([1.0, 2.0]), "temperature")
    capture = random_capture(seed, side, target, keep=20, temperature=temperature).source
    captured = capture.rows.below(first)

    # Every row that holds the token holds its first half instead; a row for the second half follows where it
    # came.
    came = target.tokens == token
    repeats = 1 + came
    behind = (np.cumsum(repeats) - 1)[came]
    spans = TokenSpans(
        *(np.repeat(a, repeats) for a in (target.tokens, target.starts, target.ends, target.flags))
    )
    spans.tokens[behind - 1], spans.tokens[behind] = first, second
    middle = spans.ends[behind] - len(halves[1])
    spans.ends[behind - 1] = spans.starts[behind] = np.maximum(middle, spans.starts[behind - 1])
    spans.flags[behind] = 0
    assume((spans.ends > spans.starts)[behind - 1].all())  # else the cut lies in the template's white space

    rng = np.random.default_rng(seed)
    token_logprobs = np.repeat(capture.token_logprobs, repeats)
    token_logprobs[behind] = np.log(rng.uniform(0.05, 0.95, len(behind)))
    counts = np.repeat(captured.counts, repeats)
    counts[behind] = 0
    split = replace(
        capture,
        tokenizer=replace(side.tokenizer, token_bytes=[*token_bytes, *halves]),
        spans=spans,
        rows=Rows(
            counts, np.where(captured.ids == token, first, captured.ids).astype(np.int32), captured.logprobs
        ),
        token_logprobs=token_logprobs,
        logsumexp=np.repeat(capture.logsumexp, repeats),
        logsumexp_temperature=np.repeat(capture.logsumexp_temperature, repeats),
    )
    half = first + 5  # a target token that nothing else goes to
    same = np.append(np.arange(first), [half, -1]).astype(np.int32)
    vocabulary_map = VocabularyMap(same, same, same, same, exact=same >= 0, kind="exact", key="")
    rows, *_ = project_responses(split, target, vocabulary_map, unmatched="skip")

    whole = as_dicts(captured)
    for row, got in enumerate(as_dicts(rows)):
        wanted = {half if i == token else i: p for i, p in whole[row].items()}
        if came[row]:
            p, f = (
                math.exp(capture.tempered_token_logprobs(row)),
                math.exp(token_logprobs[row + came[: row + 1].sum()]),
            )
            wanted[token] = p * f
            if half in wanted:
                wanted[half] = p * (1 - f)
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-12)
        else:
            assert got == wanted


@quick
@given(sides, sides, conversations, seeds, st.sampled_from([1.0, 2.0]))
def test_labels_between_source_boundaries_have_the_chain_of_their_tokens(
    theirs, ours, turns, seed, temperature
):
    """At least p_T of the first source token times p_1 of the others; that, where no other entry maps
    there.
    """
    source, target = both_spans(theirs, ours, turns)
    capture = random_capture(seed, theirs, source, keep=40, temperature=temperature)
    vocabulary_map = map_between(theirs, ours)
    rows, match, _ = project_responses(capture.source, target, vocabulary_map, unmatched="skip")
    got, row = as_dicts(rows), find_source_rows(source, target)[0]
    for number in np.flatnonzero(match == MATCHES.index("exact")):
        place, end, label = int(row[number]), target.ends[number], int(target.tokens[number])
        others = [i for i in range(place + 1, len(source)) if source.starts[i] < end]
        came = source.tokens.tolist()
        if [*source.ends[[place, *others]]][-1] != end or source.starts[place] == end:
            continue
        if not others and came[place] not in capture.stored[place]:
            continue  # it is the source's own token, and in its tail
        chain = capture.logp_t[place][came[place]] + sum(capture.logp_1[i][came[i]] for i in others)
        leads = 2 * source.has(SpanFlag.LEADING)[place] + target.has(SpanFlag.LEADING)[number]
        tables = vocabulary_map.table()[leads]
        stored = (i for i in capture.stored[place] if i < len(tables) and i != came[place])
        elsewhere = all(tables[i] != label for i in stored) and not (others and tables[came[place]] == label)
        assert math.log(got[number][label]) >= chain - 1e-3
        assert not elsewhere or abs(math.log(got[number][label]) - chain) < 1e-3


@quick
@given(sides, texts, seeds)
def test_the_bytes_of_a_token_have_together_the_probability_of_all_that_begin_like_it(theirs, text, seed):
    """A target that reads single bytes conditions on every byte read: the product of what its rows say of the
    bytes of a source token is the mass of the tokens that begin with these bytes, nothing gained and nothing
    lost."""
    ours = small_side("bytes", "")
    source, target = both_spans(replace(theirs, separator=""), ours, [text])
    capture = random_capture(seed, theirs, source, keep=200, temperature=1.0, dense=True)
    vocabulary_map = map_between(replace(theirs, separator=""), ours)
    rows, *_ = project_responses(capture.source, target, vocabulary_map, unmatched="condition")
    got, pieces = as_dicts(rows), theirs.tokenizer.token_bytes
    for place, token in enumerate(source.tokens.tolist()[:-1]):
        bytes_of = range(source.starts[place], source.ends[place])  # the target's rows, one a byte
        wanted = sum(
            math.exp(p)
            for i, p in capture.logp_1[place].items()
            if i < len(pieces) and pieces[i].startswith(pieces[token])
        )
        if wanted > 1e-3:  # less is lost in the float32 of what is stored
            product = math.prod(got[i].get(int(target.tokens[i]), 0.0) for i in bytes_of)
            assert product == pytest.approx(wanted, rel=1e-3)


def certain(side: Side, spans: TokenSpans) -> SourceRows:
    """A source that gives every token that came all the mass."""
    rows = Rows(np.ones(len(spans), np.uint8), spans.tokens, np.zeros(len(spans), np.float32))
    return SourceRows(side.tokenizer, spans, rows, 2.0, *np.zeros((3, len(spans)), np.float32))


@cache
def real(name: str) -> Side:
    tokenizer = load_tokenizer(REAL / name)
    return Side(tokenizer, {"llama2": " "}.get(name, ""), tokenizer.eos_id or 0)


@pytest.mark.parametrize(
    ("theirs", "ours", "word"),
    [("byte_level", "sentencepiece", "sure"), ("real/gpt_neox_mpt", "real/llama2", "Sure")],
)
def test_white_space_that_one_template_has_before_a_response_belongs_to_its_first_token(theirs, ours, word):
    """Vicuna <- MPT: after `ASSISTANT:` comes `▁Sure`, after `<|im_start|>assistant\\n` comes `Sure`."""
    if theirs.startswith("real/"):
        if not REAL.is_dir():
            pytest.skip(f"{REAL} is absent")
        theirs, ours = real(theirs[5:]), real(ours[5:])
    else:
        theirs, ours = small_side(theirs, ""), small_side(ours, " ")
    turns = [f"{word} the answer", f"{word}, again"]
    for source, target, first in ((theirs, ours, f" {word}"), (ours, theirs, word)):
        spans = target.spans(turns)
        certainly = certain(source, source.spans(turns))
        rows, *_ = project_responses(
            certainly, spans, map_between(source, target, remainders=False), unmatched="skip"
        )
        (token,) = target.tokenizer.encode_continuation(first)
        begins = [0, int(np.flatnonzero(spans.has(SpanFlag.STOP))[0]) + 1]
        assert spans.tokens[begins].tolist() == [token, token]
        assert [as_dicts(rows)[row] for row in begins] == [{token: 1.0}] * 2
