"""Mass is conserved: what meets adds up, what cannot be mapped joins the tail, the label gets its own."""

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from small_tokenizers import make_tokenizer

from megatron_fuse.alignment import (
    LabelMass,
    Rows,
    VocabularyMap,
    align_boundaries,
    build_vocabulary_map,
    label_mass,
    project_rows,
)
from megatron_fuse.tokenization import load_tokenizer

SEEDS = range(8)


@cache
def small(kind: str):
    return load_tokenizer(make_tokenizer(kind, Path(mkdtemp())))


def random_rows(rng, count: int, vocabulary: int, most: int = 6) -> Rows:
    """Rows with any number of entries, none included, some of nearly all the mass and some of little."""
    counts = rng.integers(0, most + 1, count).astype(np.uint8)
    ids = [rng.choice(vocabulary, n, replace=False) for n in counts]
    mass = [rng.dirichlet(np.full(n, 0.3)) * rng.random() ** 0.2 if n else np.zeros(0) for n in counts]
    logprobs = np.log(np.maximum(np.concatenate([*mass, []]), 1e-30))
    return Rows(counts, np.concatenate([*ids, []]).astype(np.int32), logprobs.astype(np.float32))


def random_map(rng, source: int, target: int) -> VocabularyMap:
    tables = rng.integers(-1, target, (4, source)).astype(np.int32)
    return VocabularyMap(*tables, exact=np.zeros(source, bool), kind="exact", key="")


def as_dicts(rows: Rows) -> list[dict[int, float]]:
    ends = np.cumsum(rows.counts.astype(int))
    mass = np.exp(rows.logprobs.astype(float))
    return [
        dict(zip(rows.ids[end - n : end].tolist(), mass[end - n : end], strict=True))
        for n, end in zip(rows.counts, ends, strict=True)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_agrees_with_a_dictionary(seed):
    rng = np.random.default_rng(seed)
    rows, vocabulary_map = random_rows(rng, 9, 40), random_map(rng, 40, 7)
    source_row = rng.integers(-1, 9, 13).astype(np.int32)
    leading, source_leading = rng.random(13) < 0.5, rng.random(9) < 0.5
    projected = project_rows(rows, source_row, vocabulary_map, leading=leading, source_leading=source_leading)
    assert (projected.counts.dtype, projected.ids.dtype, projected.logprobs.dtype) == (np.uint8, np.int32, np.float32)
    given = as_dicts(rows)
    for i, (row, got) in enumerate(zip(source_row, as_dicts(projected), strict=True)):
        expected: dict[int, float] = {}
        if row >= 0:
            name = ("ids", "leading", "source_leading", "both_leading")[2 * source_leading[row] + leading[i]]
            for token, mass in given[row].items():
                to = int(getattr(vocabulary_map, name)[token])
                if to >= 0:
                    expected[to] = expected.get(to, 0.0) + mass
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-12), f"{seed=} row {i}"
        assert list(got.values()) == sorted(got.values(), reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_kept_mass_and_tail_make_one(seed):
    """With everything mapped, to few tokens, the kept mass is the source's own within 1e-6."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 50, 300, most=255)
    tables = rng.integers(0, 3, (4, 300)).astype(np.int32)
    everything = VocabularyMap(*tables, exact=np.zeros(300, bool), kind="exact", key="")
    projected = project_rows(rows, np.arange(50), everything, leading=np.zeros(50, bool))
    assert np.abs(projected.kept() - rows.kept()).max() < 1e-6, f"{seed=}"
    assert projected.counts.max() <= 3


def test_identity_map_changes_nothing_but_the_order():
    rng = np.random.default_rng(3)
    rows = random_rows(rng, 20, 30)
    same = np.arange(30, dtype=np.int32)
    identity = VocabularyMap(same, same, same, same, exact=np.ones(30, bool), kind="exact", key="")
    projected = project_rows(rows, np.arange(20), identity, leading=np.zeros(20, bool))
    assert as_dicts(projected) == [pytest.approx(row, rel=1e-6) for row in as_dicts(rows)]


def test_nothing_to_project():
    rows = Rows(np.zeros(0, np.uint8), np.zeros(0, np.int32), np.zeros(0, np.float32))
    vocabulary_map = random_map(np.random.default_rng(0), 5, 5)
    for m in (0, 3):  # an empty response; a source without any row
        projected = project_rows(
            rows, np.full(m, -1), vocabulary_map, leading=np.zeros(m, bool), source_leading=np.zeros(0, bool)
        )
        assert projected.counts.tolist() == [0] * m and len(projected.ids) == 0


def test_bad_rows():
    with pytest.raises(ValueError, match="counts add up to 3, but 2 ids"):
        Rows(np.array([3], np.uint8), np.zeros(2, np.int32), np.zeros(2, np.float32))
    rows = Rows(np.array([1], np.uint8), np.zeros(1, np.int32), np.full(1, np.nan, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        project_rows(rows, np.zeros(1, np.int32), random_map(np.random.default_rng(0), 5, 5), leading=np.zeros(1, bool))


# The label's own mass. A toy source over whole vocabularies: every row is a full softmax over logits at T=1 and T.


def toy_rows(rng, count: int, vocabulary: int, actual: np.ndarray, keep: int, temperature: float):
    """Stored rows (top `keep` of random logits) and what a capture stores beside them."""
    logits = rng.normal(0, 3, (count, vocabulary))
    logits[np.arange(count), actual] += 4
    centred = logits - logits.max(1, keepdims=True)
    lse = np.log(np.exp(centred).sum(1))
    lse_temperature = np.log(np.exp(centred / temperature).sum(1))
    ids = np.argsort(-logits, axis=1)[:, :keep]
    logprobs = np.take_along_axis(centred, ids, 1) / temperature - lse_temperature[:, None]
    rows = Rows(np.full(count, keep, np.uint8), ids.ravel().astype(np.int32), logprobs.ravel().astype(np.float32))
    label_logprobs = centred[np.arange(count), actual] - lse
    return rows, label_logprobs, lse, lse_temperature, centred - lse[:, None]


TEXTS = [
    "the internationalization of the station is 12",
    "user hello café 日本 été nation, then",
    "x",
    "🙂🙂 answer",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("keep", [3, 8])
@pytest.mark.parametrize(
    ("one", "other"), [("byte_level", "sentencepiece"), ("sentencepiece", "tiktoken"), ("tiktoken", "llama_json")]
)
def test_label_mass_agrees_with_the_formula(one, other, keep, temperature, text):
    """A literal, scalar reading of the definition, and conservation of mass."""
    source, target = small(one), small(other)
    rng = np.random.default_rng(len(text) + keep)
    response = text.encode()
    source_tokens = np.array(source.encode_continuation(text), np.int32)
    target_tokens = np.array(target.encode_continuation(text), np.int32)
    ends, target_ends = (
        np.cumsum(t.byte_lengths[ids]).astype(np.int32) for t, ids in ((source, source_tokens), (target, target_tokens))
    )
    starts, target_starts = (np.concatenate([[0], e]).astype(np.int32) for e in (ends, target_ends))  # with stop rows
    actual = np.append(source_tokens, source.eos_id)
    rows, label_logprobs, lse, lse_temperature, logp = toy_rows(
        rng, len(actual), source.vocab_size if one != "tiktoken" else 700, actual.clip(max=699), keep, temperature
    )
    source_row = align_boundaries(starts, target_starts)
    labels = label_mass(
        rows,
        source_row,
        source,
        response=response,
        source_tokens=source_tokens,
        source_ends=ends,
        target_tokens=target_tokens,
        target_ends=target_ends,
        label_logprobs=label_logprobs,
        logsumexp=lse,
        logsumexp_temperature=lse_temperature,
        temperature=temperature,
    )
    vocabulary_map = build_vocabulary_map(source, target, source_stop=source.eos_id, target_stop=target.eos_id)
    quiet = np.zeros(len(source_row), bool)
    got = as_dicts(project_rows(rows, source_row, vocabulary_map, leading=quiet, labels=labels))
    stored = as_dicts(rows)
    for i, j in enumerate(source_row):
        if j < 0:
            assert got[i] == {}
            continue
        expected: dict[int, float] = {}
        entries = dict(stored[j])
        if i < len(target_ends) and j < len(ends) and ends[j] < target_ends[i]:
            f, t = 1.0, j + 1
            while t < len(ends) and ends[t] <= target_ends[i]:
                f *= np.exp(logp[t, actual[t].clip(max=699)])
                t += 1
            if ends[t - 1] < target_ends[i]:
                left = response[ends[t - 1] : target_ends[i]]
                known = {*stored[t], int(actual[t])}
                f *= sum(np.exp(logp[t, k]) for k in known if source.token_bytes[k].startswith(left))
            s1 = int(source_tokens[j])
            mass = np.exp((logp[j, s1] + lse[j]) / temperature - lse_temperature[j])
            if s1 in entries:
                entries[s1] *= 1 - f
            expected[int(target_tokens[i])] = mass * f
        for token, value in entries.items():
            to = int(vocabulary_map.ids[token])
            if to >= 0:
                expected[to] = expected.get(to, 0.0) + value
        assert got[i] == pytest.approx({k: v for k, v in expected.items() if v > 0}, rel=1e-4, abs=1e-9), i
        assert sum(got[i].values()) <= 1 + 1e-6


def test_one_label_of_two_source_tokens():
    """ " internationalization" here, " international" + "ization" there: p_T(first) times p_1(second)."""
    source, target = small("byte_level"), small("llama_json")
    first, second = 300, 301
    fake = [b""] * source.vocab_size
    fake[first], fake[second] = b" international", b"ization"
    rows = Rows(
        np.array([2, 1], np.uint8), np.array([first, 7, second], np.int32), np.log([0.6, 0.2, 0.9]).astype(np.float32)
    )
    labels = label_mass(
        rows,
        np.array([0], np.int32),
        source,
        response=b" internationalization",
        source_tokens=np.array([first, second], np.int32),
        source_ends=np.array([14, 21], np.int32),
        target_tokens=np.array([99], np.int32),
        target_ends=np.array([21], np.int32),
        label_logprobs=np.log([0.8, 0.75]),
        logsumexp=np.zeros(2),
        logsumexp_temperature=np.zeros(2),
        temperature=2.0,
    )
    assert np.exp(labels.log_fraction) == pytest.approx([0.75])
    ids = np.full(source.vocab_size, -1, np.int32)
    ids[[first, 7]] = 50, 51
    vocabulary_map = VocabularyMap(ids, ids, ids, ids, exact=ids >= 0, kind="exact", key="")
    got = as_dicts(project_rows(rows, np.array([0]), vocabulary_map, leading=np.zeros(1, bool), labels=labels))
    assert got == [pytest.approx({99: 0.45, 50: 0.15, 51: 0.2}, rel=1e-5)]
    assert target.vocab_size > 99


def test_label_that_ends_inside_a_source_token():
    """ "internat" here, "inter" + "nation" there: the mass of all tokens there that begin with "nat", each once."""
    source = small("byte_level")
    inter, nation, native, n = 300, 301, 302, 303
    fake = list(source.token_bytes)
    fake[inter], fake[nation], fake[native], fake[n] = b"inter", b"nation", b"native", b"na"
    source = dataclasses.replace(source, token_bytes=fake)
    for stored, mass in (([nation, native, n], 0.5 + 0.2), ([native, n, 5], 0.2 + 0.5)):  # the actual one: 0.5
        probabilities = {nation: 0.5, native: 0.2, n: 0.1, 5: 0.05}
        entries = [inter, *stored]
        logprobs = np.log([0.6, *(probabilities[token] for token in stored)]).astype(np.float32)
        labels = label_mass(
            Rows(np.array([1, 3], np.uint8), np.array(entries, np.int32), logprobs),
            np.array([0, -1], np.int32),
            source,
            response=b"internation",
            source_tokens=np.array([inter, nation], np.int32),
            source_ends=np.array([5, 11], np.int32),
            target_tokens=np.array([99, 98], np.int32),
            target_ends=np.array([8, 11], np.int32),
            label_logprobs=np.log([0.6, 0.5]),
            logsumexp=np.zeros(2),
            logsumexp_temperature=np.zeros(2),
            temperature=1.0,
        )
        assert np.exp(labels.log_fraction) == pytest.approx([mass, 0.0]), stored


def test_a_token_without_any_chance_spoils_only_its_own_label():
    """A model that masks logits gives -inf to the token that came; the labels after it know nothing of that."""
    labels = label_mass(
        Rows(np.array([1, 1, 1, 1], np.uint8), np.array([5, 6, 5, 6], np.int32), np.log([0.9] * 4).astype(np.float32)),
        np.array([0, 2], np.int32),
        small("byte_level"),
        response=b"abcd",
        source_tokens=np.array([5, 6, 5, 6], np.int32),
        source_ends=np.array([1, 2, 3, 4], np.int32),
        target_tokens=np.array([99, 98], np.int32),
        target_ends=np.array([2, 4], np.int32),
        label_logprobs=np.array([np.log(0.9), -np.inf, np.log(0.8), np.log(0.7)]),
        logsumexp=np.zeros(4),
        logsumexp_temperature=np.zeros(4),
        temperature=2.0,
    )
    assert np.exp(labels.log_fraction) == pytest.approx([0.0, 0.7])


def test_label_whose_first_source_token_was_not_stored_takes_from_the_tail():
    labels = LabelMass(np.log([0.5]), np.array([4], np.int32), np.log([0.1]), np.array([9], np.int32))
    rows = Rows(np.array([1], np.uint8), np.array([2], np.int32), np.log([0.7]).astype(np.float32))
    same = np.arange(12, dtype=np.int32)
    identity = VocabularyMap(same, same, same, same, exact=same >= 0, kind="exact", key="")
    got = as_dicts(project_rows(rows, np.array([0]), identity, leading=np.zeros(1, bool), labels=labels))
    assert got == [pytest.approx({2: 0.7, 9: 0.05}, rel=1e-5)]


def test_label_mass_refuses_responses_of_different_length():
    one = np.ones(1)
    rows = Rows(np.array([1], np.uint8), np.array([2], np.int32), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="end at byte 3, the target's at 4"):
        label_mass(
            rows,
            np.zeros(1, np.int32),
            small("byte_level"),
            response=b"abcd",
            source_tokens=np.array([5]),
            source_ends=np.array([3]),
            target_tokens=np.array([5]),
            target_ends=np.array([4]),
            label_logprobs=-one,
            logsumexp=one,
            logsumexp_temperature=one,
            temperature=1.0,
        )
