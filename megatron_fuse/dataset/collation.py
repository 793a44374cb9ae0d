"""From documents to the arrays of one micro-batch, with one document per sequence or several.

Row t of the logits predicts token t + 1. So a document of n tokens takes n - 1 positions: its last token is
never an input. The label of a position is the next token of the SAME document. A teacher's row has the
position of its label. Padded and packed sequences differ only in the position at which a document begins;
make_targets serves both.

Documents are views of memory-mapped files. Here each field is copied once, from its dtype on disk to the
dtype of the training, by a fixed number of array operations per document and none per token.

Legend: d documents, b sequences, s positions of a sequence, k entries per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.fusion_data.documents import Document

NO_LABEL = -100  # torch's cross-entropy ignores it
NO_ENTRY = -1


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of the model. Positions without a document hold token 0.

    tokens, position_ids [b, s] int64.
    starts [d]: the first position of each document among all b s positions, ascending.
    cu_seqlens [documents + 1 or 2] int32, only if packed: cumulative lengths, from 0 to s, of the parts of
        the sequence between which there is no attention. The unused end of the sequence is a part of its own.
    max_seqlen: the length of the longest part.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    starts: np.ndarray
    cu_seqlens: np.ndarray | None = None
    max_seqlen: int | None = None


@dataclass(frozen=True, eq=False)
class Targets:
    """Labels, weights and teacher entries of each position.

    [b, s]: labels int64, NO_LABEL if there is none; ce_weight and kl_weight float32, 0 without a label.
    [b, s, k]: teacher_ids int64, NO_ENTRY in empty slots;
    teacher_logprobs float32, natural logarithms at the KL temperature.
    """

    labels: np.ndarray
    teacher_ids: np.ndarray
    teacher_logprobs: np.ndarray
    ce_weight: np.ndarray
    kl_weight: np.ndarray


def padded_inputs(documents: Sequence[Document], sequences: int, length: int) -> Inputs:
    """One document per sequence, padded on the right. Sequences beyond the number of documents are empty.

    Raises ValueError if there are more documents than sequences,
    or if a document takes more than `length` positions.
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
    """All documents concatenated in one sequence. position_ids start at 0 in each document.

    Raises ValueError if the documents take more than `length` positions together.
    """
    bounds = ragged.offsets([len(document.tokens) - 1 for document in documents])
    filled = int(bounds[-1])
    _refuse_overflow(len(documents) - 1, filled, length)
    tokens = np.zeros((1, length), np.int64)
    for document, start, stop in zip(documents, bounds[:-1], bounds[1:], strict=True):
        tokens[0, start:stop] = document.tokens[:-1]
    starts = bounds[:-1]
    # The unused end becomes a part of its own, so that the parts cover the whole sequence,
    # as variable-length attention needs.
    if filled < length:
        bounds = np.append(bounds, length)
    parts = np.diff(bounds)
    position_ids = np.arange(length) - np.repeat(bounds[:-1], parts)
    return Inputs(tokens, position_ids[None], starts, bounds.astype(np.int32), int(parts.max()))


def _refuse_overflow(document: int, positions: int, length: int) -> None:
    if positions > length:
        raise ValueError(f"the documents up to number {document} take {positions} of {length} positions")


def make_targets(
    documents: Sequence[Document],
    weights: Sequence[tuple[float, float]],
    inputs: Inputs,
    entries_per_row: int,
) -> Targets:
    """Labels, weights and teacher entries of the documents, at the positions that `inputs` gives them.

    weights [d]: (CE, KL) of one supervised token of each document, divided by the denominators of the global
        batch, which do not depend on packing.
    entries_per_row: k, at least 1.

    Raises ValueError if a row has more entries.
    """
    shape, positions = inputs.tokens.shape, inputs.tokens.size
    labels = np.full(positions, NO_LABEL, np.int64)
    ce_weight, kl_weight = np.zeros((2, positions), np.float32)
    counts = np.zeros(positions, np.uint8)
    for document, (ce, kl), start in zip(documents, weights, inputs.starts, strict=True):
        # Shifted by one: the document's position t has token t + 1 as its label,
        # and is supervised if that token is.
        place, supervised = slice(start, start + len(document.tokens) - 1), document.supervised[1:]
        np.copyto(labels[place], document.tokens[1:], where=supervised)
        np.copyto(ce_weight[place], ce, where=supervised)
        np.copyto(kl_weight[place], kl, where=supervised)
        counts[place][supervised] = document.counts
    # All entries of all documents are written at once. A row with c entries fills the first c of its k slots.
    # `starts` ascend and a document's rows are in the order of its tokens, so that the filled slots in memory
    # order are the concatenated entries.
    slots = np.flatnonzero(np.arange(entries_per_row, dtype=counts.dtype) < counts[:, None])
    teacher_ids = np.full(positions * entries_per_row, NO_ENTRY, np.int64)
    teacher_logprobs = np.zeros(positions * entries_per_row, np.float32)
    if documents:
        ids = [document.teacher_ids for document in documents]
        teacher_ids[slots] = np.concatenate(ids, dtype=np.int64)
        logprobs = [document.teacher_logprobs for document in documents]
        teacher_logprobs[slots] = np.concatenate(logprobs, dtype=np.float32)
    entries = (*shape, entries_per_row)
    return Targets(
        labels.reshape(shape),
        teacher_ids.reshape(entries),
        teacher_logprobs.reshape(entries),
        ce_weight.reshape(shape),
        kl_weight.reshape(shape),
    )
