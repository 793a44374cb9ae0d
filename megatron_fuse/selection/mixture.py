"""The mixture of several teachers: the weighted sum of their distributions over the same tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.fusion_data.documents import Document, round_down_to_half


def mix(documents: Sequence[Document], weights: Sequence[float]) -> Document:
    """The mixture of the teachers of one text: in each row the sum of w_j p_j over the sources with entries
    in that row.

    documents: the same text with the rows of each source. weights [S], above 0; in each row they are divided
    by the sum of those that take part. A row without entries of any source stays empty. `match` is that of
    the first document.

    The entries of all sources stay side by side in the order of the documents: the loss adds up entries with
    equal ids. So the residual masses (tails) add up too. Log-probabilities are rounded down to float16, so
    that a row never holds more than 1.
    """
    counts = np.stack([document.counts for document in documents])  # [S, r]
    row_weights = np.where(counts > 0, np.asarray(weights, np.float64)[:, None], 0)
    shares = row_weights / np.maximum(row_weights.sum(0), np.finfo(np.float64).tiny)  # [S, r]
    # The entries are first concatenated source by source, with the row of each; the stable sort then groups
    # them by row.
    rows = np.concatenate([ragged.row_numbers(source_counts) for source_counts in counts])
    ids = np.concatenate([document.teacher_ids for document in documents])
    logprobs = np.concatenate([document.teacher_logprobs for document in documents]).astype(np.float64)
    logprobs += np.log(
        np.concatenate([np.repeat(share, count) for share, count in zip(shares, counts, strict=True)])
    )
    order = np.argsort(rows, kind="stable")
    return replace(
        documents[0],
        counts=counts.sum(0, dtype=np.int64),
        teacher_ids=ids[order],
        teacher_logprobs=round_down_to_half(logprobs[order]),
    )
