"""From documents to the arrays of one micro-batch, one document per sequence or several.

Row t of the logits predicts token t + 1. A document of n tokens therefore takes n - 1 positions: its last token is never an
input, the label of a position is the token after it in the SAME document, and a teacher's row stands where its label stands.
Padded and packed differ only in where a document begins; what a position is taught is computed by one function for both.

Everything up to here was a view of the mapped files. Each field is copied once, from the type on disk to the one that is
trained with, by a fixed number of array operations per document and none per token.

Legend: d documents, b sequences, s positions of a sequence, k entries per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fuse.fusion_data.documents import Document

NO_LABEL = -100  # what torch's cross-entropy ignores
NO_ENTRY = -1


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the model reads. Positions without a document hold token 0.

    tokens, position_ids [b, s] int64; starts [d]: first position of each document among all b s, ascending.
    cu_seqlens [documents + 1 or 2] int32 and max_seqlen, where packed: the sequence's parts between which there is no attention,
    as cumulative lengths from 0 to s, and the longest part; what is left of the sequence is a part of its own.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    starts: np.ndarray
    cu_seqlens: np.ndarray | None = None
    max_seqlen: int | None = None


@dataclass(frozen=True, eq=False)
class Targets:
    """What each position is taught: labels int64, NO_LABEL where nothing; ce_weight, kl_weight float32, 0 where nothing, [b, s];
    teacher_ids int64, NO_ENTRY in empty slots, and teacher_logprobs float32, natural log at the KL temperature, [b, s, k]."""

    labels: np.ndarray
    teacher_ids: np.ndarray
    teacher_logprobs: np.ndarray
    ce_weight: np.ndarray
    kl_weight: np.ndarray


def padded_inputs(documents: Sequence[Document], sequences: int, length: int) -> Inputs:
    """One document per sequence, padded on the right; sequences beyond the documents are empty.

    Raises ValueError where the documents are more than the sequences, or one takes more than `length` positions.
    """
    if len(documents) > sequences:
        raise ValueError(f"{len(documents)} documents in {sequences} padded sequences")
    tokens = np.zeros((sequences, length), np.int64)
    for number, document in enumerate(documents):
        inputs = document.tokens[:-1]
        _refuse_overflow(number, len(inputs), length)
        tokens[number, : len(inputs)] = inputs
    position_ids = np.tile(np.arange(length), (sequences, 1))
    return Inputs(tokens, position_ids, starts=np.arange(len(documents)) * length)


def packed_inputs(documents: Sequence[Document], length: int) -> Inputs:
    """All documents on end in one sequence, positions counted from each one's beginning.

    Raises ValueError where they take more than `length` positions together.
    """
    bounds = np.cumsum([0, *(len(document.tokens) - 1 for document in documents)])
    filled = int(bounds[-1])
    _refuse_overflow(len(documents) - 1, filled, length)
    tokens = np.zeros((1, length), np.int64)
    for document, start, stop in zip(documents, bounds[:-1], bounds[1:], strict=True):
        tokens[0, start:stop] = document.tokens[:-1]
    starts = bounds[:-1]
    if filled < length:
        bounds = np.append(bounds, length)
    parts = np.diff(bounds)
    position_ids = np.arange(length) - np.repeat(bounds[:-1], parts)
    return Inputs(tokens, position_ids[None], starts, bounds.astype(np.int32), int(parts.max()))


def _refuse_overflow(document: int, positions: int, length: int) -> None:
    if positions > length:
        raise ValueError(f"the documents up to number {document} take {positions} of {length} positions")


def make_targets(
    documents: Sequence[Document], weights: Sequence[tuple[float, float]], inputs: Inputs, entries_per_row: int
) -> Targets:
    """What the documents teach at the positions where `inputs` has put them.

    weights [d]: (CE, KL) of one supervised token of each document, by denominators of the global batch, which no packing changes.
    entries_per_row: k, at least 1. Raises ValueError where a row has more entries.
    """
    shape, positions = inputs.tokens.shape, inputs.tokens.size
    labels = np.full(positions, NO_LABEL, np.int64)
    ce_weight, kl_weight = np.zeros((2, positions), np.float32)
    counts = np.zeros(positions, np.uint8)
    for document, (ce, kl), start in zip(documents, weights, inputs.starts, strict=True):
        place, supervised = slice(start, start + len(document.tokens) - 1), document.supervised[1:]
        np.copyto(labels[place], document.tokens[1:], where=supervised)
        np.copyto(ce_weight[place], ce, where=supervised)
        np.copyto(kl_weight[place], kl, where=supervised)
        counts[place][supervised] = document.counts
    # The slots in the order of memory are the entries in the order of documents, of their rows, and of the rows' entries.
    slots = np.flatnonzero(np.arange(entries_per_row, dtype=counts.dtype) < counts[:, None])
    teacher_ids = np.full(positions * entries_per_row, NO_ENTRY, np.int64)
    teacher_logprobs = np.zeros(positions * entries_per_row, np.float32)
    if documents:
        ids = [document.entry_ids for document in documents]
        teacher_ids[slots] = np.concatenate(ids, dtype=np.int64)
        logprobs = [document.entry_logprobs for document in documents]
        teacher_logprobs[slots] = np.concatenate(logprobs, dtype=np.float32)
    entries = (*shape, entries_per_row)
    return Targets(
        labels.reshape(shape),
        teacher_ids.reshape(entries),
        teacher_logprobs.reshape(entries),
        ce_weight.reshape(shape),
        kl_weight.reshape(shape),
    )
