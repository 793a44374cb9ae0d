"""Laws of collation and packing: whatever the arrangement, every label keeps its input, its weights and
its teacher's row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fuse.dataset.collation import (
    NO_ENTRY,
    NO_LABEL,
    Inputs,
    Targets,
    make_targets,
    packed_inputs,
    padded_inputs,
)
from megatron_fuse.dataset.packing import pack, pack_evenly
from megatron_fuse.fusion_data.documents import Document

K = 5
VOCABULARY = {np.uint16: 2**16, np.int32: 2**31 - 1}


def draw_document(draw: np.random.Generator, tokens: int, dtype: type = np.uint16) -> Document:
    """Prompts and answers by turns, rows of 0 to K entries, in the types on disk."""
    supervised = np.repeat(draw.random(tokens) < 0.5, draw.integers(1, 5, tokens))[:tokens]
    supervised[:1] = False
    counts = draw.integers(0, K + 1, supervised.sum()).astype(np.uint8)
    entries = int(counts.sum())
    return Document(
        tokens=draw.integers(0, VOCABULARY[dtype], tokens).astype(dtype),
        supervised=supervised,
        counts=counts,
        teacher_ids=draw.integers(0, VOCABULARY[dtype], entries).astype(dtype),
        teacher_logprobs=-draw.exponential(3, entries).astype(np.float16),
        match=(counts > 0).astype(np.uint8),
    )


Position = tuple[int, int, float, float, tuple[tuple[int, float], ...]]
"""(input, label, weight of CE, weight of KL, the teacher's entries); label NO_LABEL: nothing is learned
there.
"""


def positions_of(document: Document, weights: tuple[float, float]) -> Iterator[Position]:
    """What a document is by definition, token by token."""
    entries = iter(zip(document.teacher_ids.tolist(), document.teacher_logprobs.tolist(), strict=True))
    counts = iter(document.counts.tolist())
    tokens, supervised = document.tokens.tolist(), document.supervised.tolist()
    for t in range(len(tokens) - 1):
        if supervised[t + 1]:
            ce, kl = (float(np.float32(weight)) for weight in weights)
            yield tokens[t], tokens[t + 1], ce, kl, tuple(next(entries) for _ in range(next(counts)))
        else:
            yield tokens[t], NO_LABEL, 0.0, 0.0, ()


def collated_positions(inputs: Inputs, targets: Targets) -> list[Position]:
    """What the arrays say of every position, in the order of memory."""
    flat = [inputs.tokens, targets.labels, targets.ce_weight, targets.kl_weight]
    columns = [array.reshape(-1).tolist() for array in flat]
    ids, logprobs = (
        array.reshape(-1, K).tolist() for array in (targets.teacher_ids, targets.teacher_logprobs)
    )
    rows = [
        tuple(pair for pair in zip(*row, strict=True) if pair[0] != NO_ENTRY)
        for row in zip(ids, logprobs, strict=True)
    ]
    return list(zip(*columns, rows, strict=True))


PADDING: Position = (0, NO_LABEL, 0.0, 0.0, ())

# 2: one position; a prompt may be all there is; none: a rank with nothing to do
batches = st.tuples(
    st.lists(st.integers(2, 40), max_size=7), st.integers(0, 2**32), st.sampled_from([*VOCABULARY])
)


def draw_batch(
    lengths: list[int], seed: int, dtype: type
) -> tuple[list[Document], list[tuple[float, float]]]:
    draw = np.random.default_rng(seed)
    documents = [draw_document(draw, tokens, dtype) for tokens in lengths]
    return documents, [tuple(draw.random(2).tolist()) for _ in documents]


@given(batches, st.integers(0, 3), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_padded_holds_every_document_in_its_own_sequence(batch: tuple, empty: int, slack: int) -> None:
    documents, weights = draw_batch(*batch)
    length = max([len(d.tokens) - 1 for d in documents], default=1) + slack
    inputs = padded_inputs(documents, len(documents) + empty, length)
    targets = make_targets(documents, weights, inputs, K)
    expected = []
    for document, pair in zip(documents, weights, strict=True):
        own = list(positions_of(document, pair))
        expected += own + [PADDING] * (length - len(own))
    assert collated_positions(inputs, targets) == expected + [PADDING] * (empty * length)
    assert (inputs.position_ids == np.arange(length)).all()
    assert (inputs.cu_seqlens, inputs.max_seqlen) == (None, None)


@given(batches, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_packed_holds_the_documents_on_end_with_their_bounds(batch: tuple, slack: int) -> None:
    documents, weights = draw_batch(*batch)
    sizes = [len(document.tokens) - 1 for document in documents]
    length = max(sum(sizes) + slack, 1)
    inputs = packed_inputs(documents, length)
    targets = make_targets(documents, weights, inputs, K)
    expected = [p for d, pair in zip(documents, weights, strict=True) for p in positions_of(d, pair)]
    rest = length - sum(sizes)
    assert inputs.tokens.shape == (1, length)
    assert collated_positions(inputs, targets) == expected + [PADDING] * rest
    parts = sizes + [rest] * (rest > 0)
    assert inputs.cu_seqlens is not None and inputs.cu_seqlens.dtype == np.int32
    assert np.diff(inputs.cu_seqlens).tolist() == parts and inputs.cu_seqlens[[0, -1]].tolist() == [0, length]
    assert inputs.max_seqlen == max(parts)
    assert inputs.position_ids[0].tolist() == [position for part in parts for position in range(part)]
    # The last position of a document is taught its own last token, never the first of the next.
    for stop, document in zip(inputs.cu_seqlens[1:].tolist(), documents, strict=False):
        assert targets.labels[0, stop - 1] == (document.tokens[-1] if document.supervised[-1] else NO_LABEL)


@given(batches, st.integers(39, 100))
@settings(max_examples=60, deadline=None)
def test_packing_changes_the_place_of_a_label_and_nothing_else(batch: tuple, capacity: int) -> None:
    documents, weights = draw_batch(*batch)

    def learned(inputs: Inputs, targets: Targets) -> Counter[Position]:
        return Counter(
            position for position in collated_positions(inputs, targets) if position[1] != NO_LABEL
        )

    padded = padded_inputs(documents, len(documents), 40)
    expected = learned(padded, make_targets(documents, weights, padded, K))
    found: Counter[Position] = Counter()
    for sequence in pack([len(document.tokens) - 1 for document in documents], capacity):
        chosen = [documents[number] for number in sequence]
        inputs = packed_inputs(chosen, capacity)
        found += learned(inputs, make_targets(chosen, [weights[number] for number in sequence], inputs, K))
    assert found == expected
    assert found.total() == sum(int(document.supervised.sum()) for document in documents)


def test_what_does_not_fit_is_refused() -> None:
    document = draw_document(np.random.default_rng(3), 30)
    with pytest.raises(ValueError, match="take 29 of 28 positions"):
        padded_inputs([document], 1, 28)
    with pytest.raises(ValueError, match="2 documents in 1 padded"):
        padded_inputs([document] * 2, 1, 29)
    with pytest.raises(ValueError, match="take 58 of 57 positions"):
        packed_inputs([document] * 2, 57)
    inputs = padded_inputs([document], 1, 32)
    with pytest.raises(ValueError):  # a row of K entries in K - 1 slots
        make_targets([document], [(1.0, 1.0)], inputs, int(document.counts.max()) - 1)


lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=40), st.just(capacity))
)


@given(lengths_and_capacity)
@settings(max_examples=200, deadline=None)
def test_packing_keeps_documents_whole_and_sequences_full(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    sequences = pack(lengths, capacity)
    assert sorted(number for sequence in sequences for number in sequence) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in sequence) for sequence in sequences]
    assert all(0 < fill <= capacity for fill in filled)
    assert all(sequence == sorted(sequence) for sequence in sequences)
    # A sequence is begun only where no other has room: no two of them fit into one.
    emptiest = sorted(filled)[:2]
    assert len(filled) < 2 or sum(emptiest) > capacity
    assert pack(np.array(lengths, np.int32), capacity) == sequences


def fewest_sequences(lengths: Sequence[int], capacity: int) -> int:
    """By trying every arrangement."""

    def place(number: int, filled: tuple[int, ...]) -> int:
        if number == len(lengths):
            return len(filled)
        options = {tuple(sorted((*filled, lengths[number])))}
        for i, fill in enumerate(filled):
            if fill + lengths[number] <= capacity:
                options.add(tuple(sorted((*filled[:i], fill + lengths[number], *filled[i + 1 :]))))
        return min(place(number + 1, option) for option in options)

    return place(0, ())


@given(st.lists(st.integers(1, 20), max_size=7))
@settings(max_examples=60, deadline=None)
def test_packing_of_few_documents_is_within_one_of_the_best(lengths: list[int]) -> None:
    assert len(pack(lengths, 20)) <= fewest_sequences(lengths, 20) + 1


@given(st.lists(lengths_and_capacity, min_size=1, max_size=3), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_even_packing_takes_no_more_sequences_and_shorter_ones(drawn: list, multiple: int) -> None:
    groups, capacity = [lengths for lengths, _ in drawn], max(capacity for _, capacity in drawn)
    sequences = pack_evenly(groups, capacity, multiple)
    plain = [pack(lengths, capacity) for lengths in groups]

    def rounded(arranged: list[list[list[int]]]) -> int:
        return -(-sum(map(len, arranged)) // multiple) * multiple

    def longest(arranged: list[list[list[int]]]) -> int:
        pairs = zip(groups, arranged, strict=True)
        return max((sum(lengths[n] for n in sequence) for lengths, of in pairs for sequence in of), default=0)

    assert rounded(sequences) <= rounded(plain) and longest(sequences) <= longest(plain)
    for lengths, of_group in zip(groups, sequences, strict=True):
        assert sorted(number for sequence in of_group for number in sequence) == list(range(len(lengths)))
    assert pack_evenly(groups, capacity, multiple) == sequences


def test_even_packing_shares_what_one_sequence_cannot_hold() -> None:
    ten = [100] * 10
    assert [len(sequence) for sequence in pack_evenly([ten], 700)[0]] == [5, 5]
    assert [len(sequence) for sequence in pack(ten, 700)] == [7, 3]
    # Five ranks wait for the longest sequence anyway; a group's documents stay among themselves.
    assert [len(sequence) for sequence in pack_evenly([ten], 700, multiple=5)[0]] == [2] * 5
    assert [[len(s) for s in of_group] for of_group in pack_evenly([ten, ten[:5]], 700, multiple=3)] == [
        [5, 5],
        [5],
    ]


def test_best_fit_takes_the_fullest_sequence_with_room() -> None:
    # 7 and 6 begin sequences; 3 fits both and goes where it leaves nothing; 4 fills the other; equal ones go
    # in order
    assert pack([3, 6, 7, 4], 10) == [[0, 2], [1, 3]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack([], 10) == []


@pytest.mark.parametrize("length", [11, 0, -1])
def test_a_document_that_cannot_be_packed_is_named(length: int) -> None:
    with pytest.raises(ValueError, match=rf"document 1 has {length} positions, but a document has 1 to 10"):
        pack([10, length, 3], 10)
