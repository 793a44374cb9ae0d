"""One teacher out of several: their distributions over the same tokens, weighed and added up."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_fuse.fusion_data.documents import Document, round_down_to_half


def mix(documents: Sequence[Document], weights: Sequence[float]) -> Document:
    """The mixture of the teachers of one text, row by row: sum of w_j p_j over those that say something at a row, w brought to 1.

    documents: one text with the rows of each source; weights [S] > 0. Entries stay side by side in the order of the documents, as
    those with equal ids add up in the loss; the tails add up of themselves. `match` is that of the first document, and a row that
    no source has stays empty. Log-probabilities are rounded down to float16, so that a row never holds more than 1.
    """
    counts = np.stack([document.counts for document in documents])  # [S, r]
    speaking = np.where(counts > 0, np.asarray(weights, np.float64)[:, None], 0)
    shares = speaking / np.maximum(speaking.sum(0), np.finfo(np.float64).tiny)  # [S, r]
    rows = np.concatenate([np.repeat(np.arange(counts.shape[1]), of) for of in counts])
    ids = np.concatenate([document.entry_ids for document in documents])
    logprobs = np.concatenate([document.entry_logprobs for document in documents]).astype(np.float64)
    logprobs += np.log(np.concatenate([np.repeat(of, count) for of, count in zip(shares, counts, strict=True)]))
    order = np.argsort(rows, kind="stable")
    return replace(
        documents[0],
        counts=counts.sum(0, dtype=np.int64),
        entry_ids=ids[order],
        entry_logprobs=round_down_to_half(logprobs[order]),
    )
