"""From a step's examples to the micro-batches of one data-parallel rank.

Modes, phases, lambdas, padding and prompts become per-token weights here, and nothing later knows of them. The denominator of a
mode is the number of its supervised tokens in the whole global batch, known from the index before any document is read, so any
split over micro-batches, data-parallel ranks, tensor and pipeline ranks gives the same loss.

Legend: b micro-batch, s sequence, k stored teacher entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_fuse.fusion_data import Document, FusionDataset
from megatron_fuse.model.gpt import FusionTargets
from megatron_fuse.recipe import Phase

MODES = ("inference", "training")
SEQUENCE_MULTIPLE = 8  # few different lengths, and whole vector lanes


@dataclass(frozen=True)
class MicroBatch:
    """Padded on the right. `targets` is None on ranks that compute no loss."""

    tokens: torch.Tensor  # [b, s] int64
    position_ids: torch.Tensor  # [b, s] int64
    targets: FusionTargets | None
    mode: torch.Tensor  # [b] int64, index in MODES


@dataclass(frozen=True)
class GlobalBatch:
    """What every rank knows of a step without reading a document."""

    documents: list[tuple[str, int]]  # (mode, example of the dataset), over all data-parallel ranks
    weights: dict[str, tuple[float, float]]  # mode -> weight of one supervised token's (CE, KL)
    supervised_tokens: dict[str, int]  # mode -> N, the denominator
    tokens: int  # input positions that carry a token, all ranks
    seq_length: int  # padded length of this step
    micro_batches: int  # of every data-parallel rank, empty ones included


def plan_batch(
    dataset: FusionDataset,
    examples: np.ndarray,
    weights: dict[str, tuple[float, float]],
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    micro_batch_multiple: int = 1,
) -> GlobalBatch:
    """The documents of these examples in the modes that have a weight.

    examples [n]: indices of the dataset. weights: mode -> (weight of the mode's mean CE, of its mean KL). Examples without a
    document in a mode (no answer won, or it does not fit) have only the other. micro_batch_multiple: the number of micro-batches
    is rounded up to it with empty ones, as Megatron's interleaved schedule needs.
    """
    documents: list[tuple[str, int]] = []
    supervised = dict.fromkeys(weights, 0)
    longest, tokens = 0, 0
    for mode in weights:
        lengths = dataset.lengths(mode)[examples]
        present = lengths > 0
        documents += [(mode, int(example)) for example in examples[present]]
        supervised[mode] = int(dataset.supervised_tokens(mode)[examples[present]].sum())
        longest = max(longest, int(lengths.max(initial=0)) - 1)
        tokens += int(lengths[present].sum() - present.sum())
    per_token = {
        mode: tuple(weight / supervised[mode] if supervised[mode] else 0.0 for weight in pair)
        for mode, pair in weights.items()
    }
    micro_batch_count = -(-len(documents) // (micro_batch_size * data_parallel_size))
    return GlobalBatch(
        documents=documents,
        weights=per_token,
        supervised_tokens=supervised,
        tokens=tokens,
        seq_length=max(-(-longest // SEQUENCE_MULTIPLE), 1) * SEQUENCE_MULTIPLE,
        micro_batches=max(-(-micro_batch_count // micro_batch_multiple), 1) * micro_batch_multiple,
    )


def phase_weights(phase: Phase, *, kl_factor: float) -> dict[str, tuple[float, float]]:
    """(w, w lambda kl_factor) of the modes that a phase learns from. kl_factor: T^2 where the recipe asks for it, else 1."""
    chosen = {mode: getattr(phase, mode) for mode in MODES}
    return {mode: (m.weight, m.weight * m.lambda_ * kl_factor) for mode, m in chosen.items() if m.weight > 0}


def micro_batches(
    dataset: FusionDataset,
    batch: GlobalBatch,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    with_targets: bool,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches: every data_parallel_size-th document, padded with empty sequences to the common number."""
    mine = batch.documents[data_parallel_rank::data_parallel_size]
    for index in range(batch.micro_batches):
        chosen = mine[index * micro_batch_size : (index + 1) * micro_batch_size]
        yield _collate(dataset, batch, chosen, micro_batch_size, with_targets, device)


def _collate(
    dataset: FusionDataset,
    batch: GlobalBatch,
    documents: list[tuple[str, int]],
    rows: int,
    with_targets: bool,
    device: torch.device,
) -> MicroBatch:
    shape = (rows, batch.seq_length)
    tokens = np.zeros(shape, np.int64)
    labels = np.full(shape, -100, np.int64)
    ce_weight, kl_weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    entries = max(dataset.entries_per_row, 1)
    teacher_ids = np.full((*shape, entries), -1, np.int64)
    teacher_logprobs = np.zeros((*shape, entries), np.float32)
    modes = np.zeros(rows, np.int64)
    for row, (mode, example) in enumerate(documents):
        document = dataset.document(mode, example)
        inputs = len(document.tokens) - 1
        tokens[row, :inputs] = document.tokens[:-1]
        modes[row] = MODES.index(mode)
        if not with_targets:
            continue
        # Row t of the logits predicts token t + 1: a supervised token is the label one position earlier.
        positions = np.flatnonzero(document.supervised) - 1
        labels[row, positions] = document.tokens[positions + 1]
        ce_weight[row, positions], kl_weight[row, positions] = batch.weights[mode]
        _scatter_entries(document, positions, teacher_ids[row], teacher_logprobs[row])
    targets = None
    if with_targets:
        arrays = (labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
        targets = FusionTargets(*map(torch.from_numpy, arrays)).to(device)
    position_ids = torch.arange(batch.seq_length, device=device).expand(shape)
    return MicroBatch(torch.from_numpy(tokens).to(device), position_ids, targets, torch.from_numpy(modes).to(device))


def _scatter_entries(document: Document, positions: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> None:
    """Ragged rows into the padded arrays [s, k]."""
    counts = document.counts.astype(np.int64)
    if len(document.entry_ids) == 0:
        return
    row = np.repeat(positions, counts)
    slot = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    ids[row, slot] = document.entry_ids
    logprobs[row, slot] = document.entry_logprobs
