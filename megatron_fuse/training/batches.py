"""From a step's examples to the micro-batches of one data-parallel rank.

Modes, phases, lambdas, margins, padding and prompts become weights per token here. Later code knows the mode
and the source of a document for its report alone. The denominator N of a mode is the number of its supervised
tokens in the whole global batch, each with the weight of its example in the inference mode. It is known from
the index before any document is read. So the loss is the same for every split over micro-batches and ranks,
and with or without packing.

An example that a source wins by a small margin counts less (FusionDataset.example_weights). In the inference
mode the weight applies to the whole document: to its cross-entropy, to its KL, and to its share of N. In the
training mode it applies to the KL alone, as the ground truth is correct whichever source wins.

Legend: b micro-batch, s sequence, k stored teacher entries.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.dataset.collation import make_targets, packed_inputs, padded_inputs
from megatron_fuse.dataset.packing import pack_evenly
from megatron_fuse.model.gpt import FusionTargets
from megatron_fuse.recipe import MODES, ModeWeights, Phase, value_at
from megatron_fuse.recipe.model_parallel import SEQUENCE_MULTIPLE
from megatron_fuse.selection.rules import NONE


@dataclass(frozen=True)
class MicroBatch:
    """One document per sequence, padded on the right;
    or, packed, b = 1 and several documents of one mode, concatenated.

    `targets` is None on ranks that compute no loss. cu_seqlens, if packed, are the bounds for variable-length
    attention (collation.Inputs): a position must see earlier positions of its own document only. lengths hold
    the same bounds on the host.
    """

    tokens: torch.Tensor  # [b, s] int64
    position_ids: torch.Tensor  # [b, s] int64
    targets: FusionTargets | None
    mode: torch.Tensor  # [b] int64, index in MODES
    # [b], or [parts] if packed, int64: the teacher's index in the dataset's sources, -1 = none.
    source: torch.Tensor
    cu_seqlens: torch.Tensor | None = None  # int32, from 0 to s
    lengths: tuple[int, ...] | None = None  # positions of each part

    def sources_by_position(self) -> torch.Tensor:
        """[b, s] int64: for each position the `source` of its document."""
        if self.cu_seqlens is None:
            return self.source[:, None].expand_as(self.tokens)
        # With output_size repeat_interleave need not wait for the GPU to learn the size of its result.
        return self.source.repeat_interleave(self.cu_seqlens.diff(), output_size=self.tokens.shape[1])[None]


@dataclass(frozen=True)
class GlobalBatch:
    """The plan of one step. Every rank has the same one, and makes it without reading a document."""

    # Of all ranks: the documents of each sequence, as (mode, example of the dataset).
    sequences: list[list[tuple[str, int]]]
    packed: bool
    # mode -> weights (CE, KL) of one supervised token, for an example of weight 1
    weights: dict[str, tuple[float, float]]
    supervised_tokens: dict[str, int]  # mode -> number of labels, whatever their weight
    # [documents] int64: input positions of each document that carry a token, of all ranks.
    positions: np.ndarray
    seq_length: int  # padded length of the sequences of this step
    micro_batches: int  # of each data-parallel rank, empty ones included
    micro_batch_size: int  # sequences of each micro-batch, empty ones included

    @property
    def documents(self) -> list[tuple[str, int]]:
        return [document for sequence in self.sequences for document in sequence]

    @property
    def tokens(self) -> int:
        """Input positions that carry a token."""
        return int(self.positions.sum())

    @property
    def taught(self) -> set[str]:
        """The modes whose KL has a weight above 0."""
        return {mode for mode, (_, kl) in self.weights.items() if kl > 0}

    @property
    def padding(self) -> float:
        """The share of positions that carry no token. Positions of empty micro-batches are not counted."""
        return 1 - self.tokens / max(len(self.sequences) * self.seq_length, 1)


def plan_batch(
    dataset: FusionDataset,
    examples: np.ndarray,
    weights: dict[str, tuple[float, float]],
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    micro_batch_multiple: int = 1,
    pack_into: int | None = None,
) -> GlobalBatch:
    """Plans the step of these examples: their documents in the modes of `weights`, arranged in sequences.

    examples [n]: indices of the dataset. An example may have no document in a mode: no answer won, or the
        document does not fit.
    weights: mode -> (weight of the mode's mean CE, weight of its mean KL).
    micro_batch_size: the most sequences of a micro-batch. They have fewer if the sequences can be divided
        evenly over as many micro-batches: an empty sequence costs as much as any other.
    micro_batch_multiple: the number of micro-batches is rounded up to a multiple of it with empty ones, as
        Megatron's interleaved schedule needs.
    pack_into: the most positions of a sequence that several documents of one mode share; None: one document
        per sequence. A packed micro-batch is one such sequence. Raises ValueError if micro_batch_size is then
        not 1.
    """
    if pack_into and micro_batch_size != 1:
        raise ValueError(f"micro_batch_size is {micro_batch_size}, but packed sequences need 1")
    # A document of n tokens takes n - 1 positions: its last token is a label only.
    present_in = {mode: examples[dataset.lengths(mode)[examples] > 0] for mode in weights}
    positions_in = {mode: dataset.lengths(mode)[present] - 1 for mode, present in present_in.items()}
    if pack_into:
        arranged = pack_evenly(
            list(positions_in.values()), pack_into, data_parallel_size * micro_batch_multiple
        )
    else:
        arranged = [[[number] for number in range(len(present))] for present in present_in.values()]
    sequences: list[list[tuple[str, int]]] = []
    longest = 0
    for mode, chosen in zip(weights, arranged, strict=True):
        present, positions = present_in[mode], positions_in[mode]
        sequences += [[(mode, int(present[number])) for number in sequence] for sequence in chosen]
        longest = max([longest, *(int(positions[sequence].sum()) for sequence in chosen)])
    micro_batch_count = -(-len(sequences) // (micro_batch_size * data_parallel_size))
    micro_batch_count = max(-(-micro_batch_count // micro_batch_multiple), 1) * micro_batch_multiple
    return GlobalBatch(
        sequences=sequences,
        packed=pack_into is not None,
        weights=_weights_per_token(dataset, weights, present_in),
        supervised_tokens={
            mode: int(dataset.supervised_tokens(mode)[present].sum()) for mode, present in present_in.items()
        },
        positions=np.concatenate(list(positions_in.values())),
        seq_length=_padded_length(longest),
        micro_batches=micro_batch_count,
        micro_batch_size=max(-(-len(sequences) // (micro_batch_count * data_parallel_size)), 1),
    )


def _weights_per_token(
    dataset: FusionDataset, weights: dict[str, tuple[float, float]], present_in: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """GlobalBatch.weights: the weights of each mode's means, divided by N.

    present_in: mode -> the step's examples that have a document in it. The division by N happens here, once,
    and nowhere in the loss: a token's weight then holds all its factors.
    """
    per_token = {}
    for mode, (ce, kl) in weights.items():
        present = present_in[mode]
        labels = dataset.supervised_tokens(mode)[present]
        # In the inference mode the tokens of an example count with the example's weight, so that a weight
        # below 1 does not only make the gradient smaller. In the training mode they all count 1.
        counted = dataset.example_weights(mode)[present] if mode == "inference" else 1
        denominator = float((labels * counted).sum(dtype=np.float64))
        per_token[mode] = (ce / denominator, kl / denominator) if denominator else (0.0, 0.0)
    return per_token


def longest_sequence(dataset: FusionDataset, phases: Iterable[Phase], *, pack_into: int | None = None) -> int:
    """The largest seq_length that plan_batch may give to a step of these phases, from the index alone.

    Without packing a sequence is one document: the result is the longest document that any phase learns from.
    With packing a sequence has up to pack_into positions.
    A step uses fewer only if its documents fit into fewer.
    """
    if pack_into:
        return _padded_length(pack_into)
    modes = {mode for phase in phases for mode in MODES if getattr(phase, mode).is_used}
    return _padded_length(max(int(dataset.lengths(mode)[dataset.train].max()) for mode in modes) - 1)


def _padded_length(positions: int) -> int:
    return max(-(-positions // SEQUENCE_MULTIPLE), 1) * SEQUENCE_MULTIPLE


def phase_weights(phase: Phase, *, progress: float, kl_factor: float) -> dict[str, tuple[float, float]]:
    """mode -> (w, w lambda kl_factor) of the modes that a phase learns from, with w and lambda at `progress`
    of the phase.

    progress: from 0 to 1.
    kl_factor: T^2 if the recipe asks for it, else 1.

    A mode whose ramp is at 0 stays in the result, so that every step of a phase reads the same kinds of
    documents.
    """
    weights = {}
    for mode in MODES:
        mode_weights: ModeWeights = getattr(phase, mode)
        if mode_weights.is_used:
            weight, lambda_ = (
                value_at(value, progress) for value in (mode_weights.weight, mode_weights.lambda_)
            )
            weights[mode] = (weight, weight * lambda_ * kl_factor)
    return weights


def micro_batches(
    dataset: FusionDataset,
    batch: GlobalBatch,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    with_targets: bool,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches: every data_parallel_size-th sequence.

    Empty ones follow up to the common number.
    """
    of_this_rank, size = batch.sequences[data_parallel_rank::data_parallel_size], batch.micro_batch_size
    for index in range(batch.micro_batches):
        sequences = of_this_rank[index * size : (index + 1) * size]
        # Megatron's data parallelism averages the gradients over the ranks. The loss needs their sum, as N is
        # of the whole global batch: the weights contain the factor data_parallel_size.
        yield _collate(dataset, batch, sequences, data_parallel_size, with_targets, device)


def _token_weights(
    dataset: FusionDataset, batch: GlobalBatch, mode: str, example: int, factor: float
) -> tuple[float, float]:
    """Weights (CE, KL) of one supervised token of a document, times the factor."""
    ce, kl = (factor * weight for weight in batch.weights[mode])
    example_weight = dataset.example_weights(mode).item(example)
    return (ce * example_weight if mode == "inference" else ce), kl * example_weight


def _collate(
    dataset: FusionDataset,
    batch: GlobalBatch,
    sequences: list[list[tuple[str, int]]],
    weight_factor: float,
    with_targets: bool,
    device: torch.device,
) -> MicroBatch:
    chosen = [document for sequence in sequences for document in sequence]
    documents = [dataset.document(mode, example) for mode, example in chosen]
    inputs = (
        packed_inputs(documents, batch.seq_length)
        if batch.packed
        else padded_inputs(documents, batch.micro_batch_size, batch.seq_length)
    )
    targets = None
    if with_targets:
        weights = [_token_weights(dataset, batch, mode, example, weight_factor) for mode, example in chosen]
        arrays = make_targets(documents, weights, inputs, max(dataset.entries_per_row, 1))
        targets = FusionTargets(**{name: on_device(array, device) for name, array in vars(arrays).items()})
    # Packed, the unused end of the sequence is a part of its own: it has no source.
    bounds = inputs.cu_seqlens
    parts = batch.micro_batch_size if bounds is None else len(bounds) - 1
    sources = [dataset.winners(mode).item(example) for mode, example in chosen]
    modes = [MODES.index(sequence[0][0]) for sequence in sequences]  # a sequence's documents are of one mode
    return MicroBatch(
        tokens=on_device(inputs.tokens, device),
        position_ids=on_device(inputs.position_ids, device),
        targets=targets,
        mode=on_device(np.array(modes + [0] * (batch.micro_batch_size - len(modes))), device),
        source=on_device(np.array(sources + [NONE] * (parts - len(sources))), device),
        cu_seqlens=None if bounds is None else on_device(bounds, device),
        lengths=None if bounds is None else tuple(np.diff(bounds).tolist()),
    )


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device. On a GPU the copy comes from pinned memory, so that it does not
    wait for the GPU.

    A copy from memory that is not pinned would wait until all earlier work of the GPU is done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
