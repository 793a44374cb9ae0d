"""Pairs are counted where both tokens begin at the same byte, and add up over shards."""

from collections import Counter

import numpy as np
import pytest

from megatron_fuse.alignment.statistics import PairCounts, count_pairs
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans


def cut(rng: np.random.Generator, size: int, share: float, vocabulary: int) -> TokenSpans:
    """Tokens of a text of `size` bytes that ends with a stop token, some of them leading or lossy."""
    inner = 1 + np.flatnonzero(rng.random(size - 2) < share)
    edges = np.concatenate([[0], inner, [size - 1, size]])
    flags = rng.choice([0, SpanFlag.LOSSY, SpanFlag.LEADING], len(edges) - 1, p=[0.9, 0.05, 0.05]).astype(
        np.uint8
    )
    flags[-1] = SpanFlag.STOP
    tokens = rng.integers(0, vocabulary, len(edges) - 1).astype(np.int32)
    return TokenSpans(tokens, edges[:-1], edges[1:], flags)


def as_counter(pairs: PairCounts) -> Counter:
    return Counter(
        dict(zip(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True), pairs.counts, strict=True))
    )


def counted_one_by_one(source: TokenSpans, target: TokenSpans) -> Counter:
    counts = Counter()
    for token, start, flags in zip(source.tokens, source.starts, source.flags, strict=True):
        for other, begin, also in zip(target.tokens, target.starts, target.flags, strict=True):
            counts[int(token), int(other)] += start == begin and not flags and not also
    return +counts


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_tokens_that_begin_at_the_same_byte(seed):
    rng = np.random.default_rng(seed)
    source, target = cut(rng, 200, 0.4, 7), cut(rng, 200, 0.6, 5)
    assert as_counter(PairCounts.of(source, target)) == counted_one_by_one(source, target)


def test_counts_of_shards_add_up():
    rng = np.random.default_rng(0)
    sizes = [40, 2, 90, 17]
    shards = [(cut(rng, size, 0.5, 6), cut(rng, size, 0.5, 6)) for size in sizes]
    expected = sum((counted_one_by_one(*shard) for shard in shards), Counter())
    assert expected and as_counter(count_pairs(shards)) == expected
    assert as_counter(count_pairs(reversed(shards))) == expected
    offsets = np.cumsum([0, *sizes[:-1]])
    joined = [TokenSpans.join(side, offsets) for side in zip(*shards, strict=True)]
    assert as_counter(PairCounts.of(*joined)) == expected
    total = count_pairs(shards)
    order = np.lexsort((total.target, total.source))
    assert (order == np.arange(len(order))).all() and (total.counts > 0).all()


def test_no_text_gives_no_pairs():
    total = count_pairs([])
    assert not len(total.counts)
    assert total.most_frequent(np.array([3, -1])).tolist() == [3, -1]


def test_tokens_beyond_two_to_the_sixteen():
    edges = np.arange(4)
    source = TokenSpans(np.array([0, 70000, 0], np.int32), edges[:-1], edges[1:], np.zeros(3, np.uint8))
    target = TokenSpans(np.array([151935, 1, 151935], np.int32), edges[:-1], edges[1:], np.zeros(3, np.uint8))
    assert as_counter(PairCounts.of(source, target)) == {(0, 151935): 2, (70000, 1): 1}


@pytest.mark.parametrize("seed", range(5))
def test_most_frequent_or_the_other_choice(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 4, (30, 6))  # many ties, many rows of zeros
    table[rng.random(30) < 0.2] = 0
    source, target = np.nonzero(table)
    pairs = PairCounts(source.astype(np.int32), target.astype(np.int32), table[source, target])
    otherwise = rng.integers(-1, 6, 30).astype(np.int32)
    chosen = pairs.most_frequent(otherwise)
    assert chosen.dtype == np.int32
    for token, row in enumerate(table):
        most = np.flatnonzero(row == row.max())
        assert chosen[token] == (most[0] if row.any() and len(most) == 1 else otherwise[token])


def test_a_planted_mapping_is_found():
    """Three times of four the target token is a fixed one for each source token, else any."""
    rng = np.random.default_rng(1)
    planted = rng.permutation(50)
    size = 4000
    source = cut(rng, size, 1.0, 50)
    tokens = np.where(rng.random(size) < 0.75, planted[source.tokens], rng.integers(0, 50, size)).astype(
        np.int32
    )
    target = TokenSpans(tokens, source.starts, source.ends, source.flags)
    assert (PairCounts.of(source, target).most_frequent(np.full(50, -1)) == planted).all()
