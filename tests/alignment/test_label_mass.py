"""A label that contains a whole source token and goes on beyond it gets its own mass."""

from dataclasses import replace

import numpy as np
import pytest
from random_captures import as_dicts, small

from megatron_fuse.alignment import Rows, SourceRows, VocabularyMap, find_source_rows, project_responses
from megatron_fuse.alignment.label_mass import label_mass
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans

LABEL = 99
PIECES = {
    300: b" international",
    301: b"ization",
    302: b"izat",
    303: b"ize",
    304: b"iz",
    305: b" intern",
    306: b"al",
}


def tokenizer_with(pieces: dict[int, bytes]):
    tokenizer = small("byte_level")
    return replace(
        tokenizer, token_bytes=[pieces.get(i, piece) for i, piece in enumerate(tokenizer.token_bytes)]
    )


def spans(tokens: list[int], pieces: dict[int, bytes], offset: int = 0) -> TokenSpans:
    ends = np.cumsum([0, *(len(pieces[token]) for token in tokens)]) + offset
    return TokenSpans(np.array(tokens, np.int32), ends[:-1], ends[1:], np.zeros(len(tokens), np.uint8))


def source_rows(
    came: TokenSpans, rows: list[dict[int, float]], token_probabilities, temperature=2.0
) -> SourceRows:
    """rows: id -> probability at the temperature; log-sum-exps of 0."""
    nothing = np.zeros(len(came), np.float32)
    with np.errstate(divide="ignore"):
        token_logprobs = np.log(np.array(token_probabilities, np.float64))
    return SourceRows(
        tokenizer=tokenizer_with(PIECES),
        spans=came,
        rows=Rows(
            np.array([len(row) for row in rows], np.uint8),
            np.array([i for row in rows for i in row], np.int32),
            np.log([p for row in rows for p in row.values()]).astype(np.float32),
        ),
        temperature=temperature,
        token_logprobs=token_logprobs,
        logsumexp=nothing,
        logsumexp_temperature=nothing,
    )


def only(**to: int) -> VocabularyMap:
    """A map of nothing but these: i300=50 sends 300 to 50."""
    ids = np.full(small("byte_level").vocab_size, -1, np.int32)
    ids[[int(name[1:]) for name in to]] = list(to.values())
    return VocabularyMap(ids, ids, ids, ids, exact=ids >= 0, kind="exact", key="")


def fractions(source: SourceRows, target: TokenSpans) -> dict[int, float]:
    """Target row -> f"""
    found = label_mass(source, target, *find_source_rows(source.spans, target))
    return dict(zip(found.rows.tolist(), np.exp(found.log_fraction).tolist(), strict=True))


def test_one_label_of_two_source_tokens():
    """ " internationalization" here, " international" + "ization" there: p_T(first) times p_1(second)."""
    source = source_rows(spans([300, 301], PIECES), [{300: 0.6, 7: 0.2}, {301: 0.9}], [0.8, 0.75])
    target = spans([LABEL], {LABEL: b" internationalization"})
    assert fractions(source, target) == pytest.approx({0: 0.75})
    rows, *_ = project_responses(source, target, only(i300=50, i7=51), unmatched="skip")
    assert as_dicts(rows) == [pytest.approx({LABEL: 0.45, 50: 0.15, 51: 0.2}, rel=1e-5)]


def test_own_mass_adds_to_what_the_map_gives_the_label():
    source = source_rows(spans([300, 301], PIECES), [{300: 0.6, 7: 0.2}, {301: 0.9}], [0.8, 0.75])
    target = spans([LABEL], {LABEL: b" internationalization"})
    rows, *_ = project_responses(source, target, only(i300=50, i7=LABEL), unmatched="skip")
    assert as_dicts(rows) == [pytest.approx({LABEL: 0.65, 50: 0.15}, rel=1e-5)]


@pytest.mark.parametrize(("stored", "mass"), [([301, 302, 304], 0.5 + 0.2), ([302, 304, 303], 0.2 + 0.5)])
def test_label_that_ends_inside_a_source_token(stored, mass):
    """ " internationaliza" here, " international" + "ization" there: the mass of all known tokens there that
    begin with "iza", each once; the one that came, of probability 0.5, is known also where it is not
    stored."""
    second = {301: 0.5, 302: 0.2, 303: 0.1, 304: 0.05}
    rows = [{300: 0.6}, {token: second[token] for token in stored}]
    source = source_rows(spans([300, 301], PIECES), rows, [0.6, 0.5], temperature=1.0)
    target = spans([LABEL, 98], {LABEL: b" internationaliza", 98: b"tion"})
    assert fractions(source, target) == pytest.approx({0: mass})


def test_first_token_that_is_not_stored_takes_from_the_tail():
    source = source_rows(spans([300, 301], PIECES), [{7: 0.7}, {301: 0.9}], [0.04, 0.5])
    target = spans([LABEL], {LABEL: b" internationalization"})
    rows, *_ = project_responses(source, target, only(i7=7), unmatched="skip")
    # 0.2: sqrt(0.04), at T = 2.
    assert as_dicts(rows) == [pytest.approx({7: 0.7, LABEL: 0.2 * 0.5}, rel=1e-5)]


def test_row_that_begins_inside_the_first_token():
    """ " intern" is read; " international" + "ization" there, "ationalization" here: p(300 | begins so) times
    p_1(301). Where 300 is not stored, conditioning has left no tail for it to come out of."""
    target = spans([98, LABEL], {98: b" intern", LABEL: b"ationalization"})
    lengths = tokenizer_with(PIECES).byte_lengths.astype(np.int32)
    everything = np.full(np.maximum(lengths - 1, 0).sum(), 50, np.int32)  # whatever is left over goes to 50
    vocabulary_map = replace(only(), byte_lengths=lengths, remainder_ids=everything)
    for stored, wanted in (({300: 0.5, 305: 0.3}, {LABEL: 0.5, 50: 0.125}), ({305: 0.8}, {})):
        source = source_rows(spans([300, 301], PIECES), [stored, {301: 0.9}], [0.8, 0.8])
        rows, *_ = project_responses(source, target, vocabulary_map, unmatched="condition")
        assert as_dicts(rows)[1] == pytest.approx(wanted, rel=1e-5)


def test_labels_that_the_source_does_not_reach_the_end_of_are_left_alone():
    target = spans([LABEL, 98], {LABEL: b" internationalization", 98: b"x"})
    pieces = {**PIECES, 8: b"x"}
    for came in ([300], [300, 304]):  # the source's rows break off
        source = source_rows(spans(came, pieces), [{300: 0.6}] * len(came), [0.5] * len(came))
        assert fractions(source, target) == {}
    for after in (22, 23):  # and its next turn begins later
        source = TokenSpans.join([spans([300], pieces), spans([8], pieces)], [0, after])
        assert fractions(source_rows(source, [{300: 0.6}] * 2, [0.5] * 2), target) == {}


@pytest.mark.parametrize(("flags", "wanted"), [("...", {0: 0.35}), ("?..", {}), (".?.", {}), ("..?", {})])
@pytest.mark.parametrize("label", [b" internationalization", b" internationalizat"])
def test_labels_over_bytes_that_the_source_has_not_read_are_left_alone(flags, wanted, label):
    source = spans([305, 306, 301], {**PIECES, 306: b"ational"})
    source = replace(source, flags=np.array([SpanFlag.LOSSY * (flag == "?") for flag in flags], np.uint8))
    rows = source_rows(source, [{305: 0.6}, {}, {}], [0.5, 0.5, 0.7])
    assert fractions(rows, spans([LABEL], {LABEL: label})) == pytest.approx(wanted)


def test_a_token_without_any_chance_spoils_only_its_own_label():
    """A model that masks logits gives -inf, or float32's least number, to the token that came."""
    pieces = dict.fromkeys((5, 6), b"x")
    target = spans([LABEL, 98], {LABEL: b"xx", 98: b"xx"})
    source = source_rows(spans([5, 6, 5, 6], pieces), [{5: 0.9}, {6: 0.9}] * 2, [0.9, 0.0, 0.8, 0.7])
    assert fractions(source, target) == pytest.approx({1: 0.7})
    least = np.where(np.isinf(source.token_logprobs), np.finfo(np.float32).min, source.token_logprobs)
    assert fractions(replace(source, token_logprobs=least), target) == pytest.approx({1: 0.7})


def test_long_shards_lose_no_digits():
    """300 000 rows of one byte, labels of three: the last f is as good as the first."""
    rng, count = np.random.default_rng(0), 300_000
    logprobs = rng.normal(-3, 2, count).clip(max=0)
    logprobs[::1000] = -700
    source = source_rows(spans([5] * count, {5: b"x"}), [{}] * count, np.ones(count))
    target = spans([LABEL] * (count // 3), {LABEL: b"xxx"})
    found = label_mass(
        replace(source, token_logprobs=logprobs), target, *find_source_rows(source.spans, target)
    )
    wanted = logprobs[1::3] + logprobs[2::3]
    np.testing.assert_allclose(found.log_fraction, wanted, rtol=1e-15)
