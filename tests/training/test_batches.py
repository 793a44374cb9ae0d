"""A step's documents and weights, whichever ranks, micro-batches and packing they are split over."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import SyntheticDataset

from megatron_fuse.recipe import MODES
from megatron_fuse.training.batches import GlobalBatch, MicroBatch, micro_batches, on_device, plan_batch

WEIGHTS = {"inference": (0.1, 0.05), "training": (1.0, 0.5)}
EXAMPLES = np.random.default_rng(2).permutation(53)[:19]  # some without an answer, one without teacher rows
CAPACITY = 40  # positions; the documents take 3 to 28


def split(batch: GlobalBatch, dataset: SyntheticDataset, ranks: int) -> Iterator[MicroBatch]:
    """The micro-batches of all ranks."""
    for rank in range(ranks):
        mine = list(
            micro_batches(
                dataset,
                batch,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
                with_targets=True,
                device=torch.device("cpu"),
            )
        )
        assert len(mine) == batch.micro_batches  # or the ranks would wait for each other
        shape = batch.micro_batch_size, batch.seq_length
        assert {tuple(micro_batch.tokens.shape) for micro_batch in mine} == {shape}
        yield from mine


def learned(batch: GlobalBatch, dataset: SyntheticDataset, ranks: int) -> Counter[Any]:
    """(mode, source, position in its document, input, label, weights, the row's ids, their
    log-probabilities) of every label.
    """
    found: Counter[Any] = Counter()
    for micro_batch in split(batch, dataset, ranks):
        targets = micro_batch.targets
        assert targets is not None
        sources = micro_batch.sources_by_position()
        for b, s in (targets.labels != -100).nonzero().tolist():
            # Megatron averages the ranks' gradients, so that a weight is their number times what it counts.
            weights = (
                float(f"{of[b, s].item() / ranks:.6g}") for of in (targets.ce_weight, targets.kl_weight)
            )
            found[
                MODES[micro_batch.mode[b]],
                int(sources[b, s]),
                int(micro_batch.position_ids[b, s]),
                int(micro_batch.tokens[b, s]),
                targets.labels[b, s].item(),
                *weights,
                *(tuple(of[b, s].tolist()) for of in (targets.teacher_ids, targets.teacher_logprobs)),
            ] += 1
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["all alike", "margins"])
def dataset(request: pytest.FixtureRequest) -> SyntheticDataset:
    return SyntheticDataset(margins=request.param)


@pytest.fixture(scope="module")
def whole(dataset: SyntheticDataset) -> Counter[Any]:
    """The batch of one rank in one micro-batch."""
    batch = plan_batch(dataset, EXAMPLES, WEIGHTS, micro_batch_size=64, data_parallel_size=1)
    return learned(batch, dataset, 1)


# (ranks, micro-batch size, multiple of the number of micro-batches, capacity): 3 and 4 do not divide the
# documents
@pytest.mark.parametrize(
    ("ranks", "size", "multiple", "capacity"),
    [
        (1, 1, 1, None),
        (2, 4, 1, None),
        (3, 2, 4, None),
        (1, 1, 1, CAPACITY),
        (2, 1, 4, CAPACITY),
        (3, 1, 1, 28),
    ],
)
def test_a_split_changes_nothing_that_is_learned(
    dataset: SyntheticDataset, whole: Counter[Any], ranks: int, size: int, multiple: int, capacity: int | None
) -> None:
    batch = plan_batch(
        dataset,
        EXAMPLES,
        WEIGHTS,
        micro_batch_size=size,
        data_parallel_size=ranks,
        micro_batch_multiple=multiple,
        pack_into=capacity,
    )
    assert learned(batch, dataset, ranks) == whole
    assert batch.micro_batches % multiple == 0


# 37 documents; (ranks, most sequences, multiple) -> (micro-batches, sequences of each)
@pytest.mark.parametrize(
    ("ranks", "most", "multiple", "expected"),
    [
        (1, 64, 1, (1, 37)),  # none is empty, though there is place for more
        (1, 16, 1, (3, 13)),
        (2, 16, 1, (2, 10)),
        (2, 4, 4, (8, 3)),  # 5 micro-batches would do: 3 more make all of them smaller
    ],
)
def test_micro_batches_are_no_larger_than_their_sequences_need(
    dataset: SyntheticDataset, ranks: int, most: int, multiple: int, expected: tuple[int, int]
) -> None:
    sizes = {"micro_batch_size": most, "data_parallel_size": ranks, "micro_batch_multiple": multiple}
    batch = plan_batch(dataset, EXAMPLES, WEIGHTS, **sizes)
    assert (batch.micro_batches, batch.micro_batch_size) == expected


@pytest.mark.parametrize("capacity", [None, CAPACITY])
def test_weights_of_a_mode_add_up_to_its_own(dataset: SyntheticDataset, capacity: int | None) -> None:
    batch = plan_batch(
        dataset, EXAMPLES, WEIGHTS, micro_batch_size=1, data_parallel_size=2, pack_into=capacity
    )
    sums = torch.zeros(len(MODES), 2, dtype=torch.float64)
    for micro_batch in split(batch, dataset, 2):
        assert micro_batch.targets is not None
        for column, weights in enumerate((micro_batch.targets.ce_weight, micro_batch.targets.kl_weight)):
            sums[:, column].index_add_(0, micro_batch.mode, weights.double().sum(1) / 2)  # of two ranks
    # An example with a small margin counts less: in the inference mode beside the mode's other documents, in
    # the training mode only its KL.
    labels = dataset.supervised_tokens("training")[EXAMPLES]
    counted = (labels * dataset.example_weights("training")[EXAMPLES]).sum() / labels.sum()
    expected = {
        "inference": WEIGHTS["inference"],
        "training": (WEIGHTS["training"][0], WEIGHTS["training"][1] * counted),
    }
    for number, mode in enumerate(MODES):
        assert sums[number].tolist() == pytest.approx(expected[mode], rel=1e-6)
        assert batch.supervised_tokens[mode] == dataset.supervised_tokens(mode)[EXAMPLES].sum()
    assert batch.tokens == sum(
        len(dataset.document(mode, example).tokens) - 1 for mode, example in batch.documents
    )


def test_a_document_counts_as_its_example_does() -> None:
    """Beside the same documents where all count alike."""
    barely, alike = SyntheticDataset(margins=True), SyntheticDataset()
    sizes = {"micro_batch_size": 1, "data_parallel_size": 1}
    first, second = (plan_batch(dataset, EXAMPLES, WEIGHTS, **sizes) for dataset in (barely, alike))
    assert first.sequences == second.sequences
    tokens, weights = (
        barely.supervised_tokens("inference")[EXAMPLES],
        barely.example_weights("inference")[EXAMPLES],
    )
    share = tokens.sum() / (tokens * weights).sum()  # of the smaller denominator
    pairs = zip(split(first, barely, 1), split(second, alike, 1), first.documents, strict=True)
    for ours, theirs, (mode, example) in pairs:
        assert ours.targets is not None and theirs.targets is not None
        weight = barely.example_weights(mode).item(example)
        ce, kl = (weight * share, weight * share) if mode == "inference" else (1, weight)
        torch.testing.assert_close(ours.targets.ce_weight, theirs.targets.ce_weight * ce, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.targets.kl_weight, theirs.targets.kl_weight * kl, rtol=1e-6, atol=0)


def test_a_position_has_the_source_of_its_document(dataset: SyntheticDataset) -> None:
    batch = plan_batch(dataset, EXAMPLES, WEIGHTS, micro_batch_size=1, data_parallel_size=1)
    seen = set()
    for micro_batch, (mode, example) in zip(split(batch, dataset, 1), batch.documents, strict=True):
        source = int(dataset.winners(mode)[example])
        assert micro_batch.sources_by_position().tolist() == [[source] * batch.seq_length]
        seen.add(source)
    assert {-1, 0, 1} <= seen


def test_packed_sequences_are_fewer_and_hold_one_mode(dataset: SyntheticDataset) -> None:
    options = {"micro_batch_size": 1, "data_parallel_size": 1}
    padded = plan_batch(dataset, EXAMPLES, WEIGHTS, **options)
    packed = plan_batch(dataset, EXAMPLES, WEIGHTS, **options, pack_into=CAPACITY)
    assert sorted(packed.documents) == sorted(padded.documents)
    assert len(packed.sequences) < len(padded.sequences) == len(padded.documents)
    assert all(len({mode for mode, _ in sequence}) == 1 for sequence in packed.sequences)
    assert packed.seq_length <= CAPACITY
    for batch in (packed, padded):
        tokens = sum(len(dataset.document(*document).tokens) - 1 for document in batch.documents)
        assert batch.padding == pytest.approx(1 - tokens / (len(batch.sequences) * batch.seq_length))
    for micro_batch, sequence in zip(split(packed, dataset, 1), packed.sequences, strict=True):
        lengths = [len(dataset.document(mode, example).tokens) - 1 for mode, example in sequence]
        assert micro_batch.cu_seqlens is not None
        parts = micro_batch.cu_seqlens.diff().tolist()
        assert parts[: len(lengths)] == lengths and sum(parts) == packed.seq_length
        assert list(micro_batch.lengths) == parts


def test_ranks_without_the_loss_get_the_same_inputs(dataset: SyntheticDataset) -> None:
    batch = plan_batch(dataset, EXAMPLES, WEIGHTS, micro_batch_size=2, data_parallel_size=1)
    options = {"data_parallel_rank": 0, "data_parallel_size": 1, "device": torch.device("cpu")}
    first, last = (list(micro_batches(dataset, batch, with_targets=w, **options)) for w in (False, True))
    for a, b in zip(first, last, strict=True):
        assert a.targets is None
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.position_ids, b.position_ids)


def test_packed_sequences_go_one_by_one(dataset: SyntheticDataset) -> None:
    with pytest.raises(ValueError, match="micro_batch_size is 2"):
        plan_batch(dataset, EXAMPLES, WEIGHTS, micro_batch_size=2, data_parallel_size=1, pack_into=CAPACITY)


def test_batches_are_copied_to_a_gpu_from_pinned_memory_while_it_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, **options: copies.append((device, options)) or tensor
    )
    device = torch.device("cuda", 3)
    on_device(np.arange(4), device)
    assert copies == ["pinned", (device, {"non_blocking": True})]
    copies.clear()
    on_device(np.arange(4), torch.device("cpu"))
    assert copies == [(torch.device("cpu"), {})]
