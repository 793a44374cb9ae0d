"""From logits to sparse distributions: the likeliest entries, and what makes the rest of the mass exact.

Everything is relative to the row's largest logit, in fp32. With z the logits, r = z - max z and lse_T = log sum_v exp(r_v / T) over
the WHOLE vocabulary, log p_T(v) = r_v / T - lse_T for every captured temperature T: the tail's mass at T=2 cannot be had from
probabilities at T=1.

Entries stand in falling order of logit, equal logits in rising order of id. So the entries of a row depend on its logits alone, not
on the rows beside it, the number of threads or the device.

Legend: n rows, v vocabulary, k stored entries, t temperatures, e entries of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fuse_kernels import topk_logsumexp


@dataclass(frozen=True)
class SparseRows:
    """counts uint8 [n]: entries of each row; ids int32 [e] and relative logits float32 [e], falling within a row;
    lse float32 [n, 1 + t] at T = 1 and at every temperature; token_logprobs float32 [n]: log p_1 of the token that came.
    vocab_size: columns that the model's logits have, 0 where there was no row to see them in."""

    counts: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    lse: np.ndarray
    token_logprobs: np.ndarray
    vocab_size: int

    @classmethod
    def none(cls, temperatures: int) -> "SparseRows":
        nothing = np.zeros(0, np.float32)
        lse = np.zeros((0, 1 + temperatures), np.float32)
        return cls(np.zeros(0, np.uint8), np.zeros(0, np.int32), nothing, lse, nothing, 0)

    @classmethod
    def join(cls, parts: Sequence["SparseRows"]) -> "SparseRows":
        return cls(
            counts=np.concatenate([part.counts for part in parts]),
            ids=np.concatenate([part.ids for part in parts]),
            logits=np.concatenate([part.logits for part in parts]),
            lse=np.concatenate([part.lse for part in parts]),
            token_logprobs=np.concatenate([part.token_logprobs for part in parts]),
            vocab_size=max(part.vocab_size for part in parts),
        )

    def split(self, lengths: Sequence[int]) -> list["SparseRows"]:
        """Parts of so many rows each."""
        at = np.cumsum(lengths)[:-1]
        entries = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])[at]
        by_row = (np.split(array, at) for array in (self.counts, self.lse, self.token_logprobs))
        by_entry = (np.split(array, entries) for array in (self.ids, self.logits))
        return [
            SparseRows(counts, ids, logits, lse, token_logprobs, self.vocab_size)
            for counts, lse, token_logprobs, ids, logits in zip(*by_row, *by_entry, strict=True)
        ]


class NotFiniteError(Exception):
    """NaN or infinity in the logits of one row."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}")
        self.row = row


def sparse_rows(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    top_k: int,
    top_p: float,
    filter: str,
    temperatures: Sequence[float],
) -> SparseRows:
    """Sparse form of logits [n, v], any float type; tokens [n] int64: the tokens that these rows predicted.

    Kept are the top_k largest; of these, what `kept_by_mass` keeps. Raises NotFiniteError.
    Besides the logits and the entries, `fuse_kernels.topk_logsumexp` needs a scratch of a few MB (CPU) or none (GPU).
    """
    vocab_size = logits.shape[1]
    found = topk_logsumexp(logits, min(top_k, vocab_size), (1.0, *temperatures), labels=tokens)
    top, lse = found.logits[:, :1], found.relative_lse
    bad = ~lse[:, 0].isfinite()  # the sum meets every NaN and +inf; and of all -inf there is no relative logit
    if bad.any():
        raise NotFiniteError(int(bad.nonzero()[0]))
    relative = found.logits - top
    assert found.label_logits is not None  # labels are given
    keep = kept_by_mass(relative, lse[:, 0], top_p=top_p, filter=filter, temperature=temperatures[0])
    return SparseRows(
        counts=keep.sum(1).to(torch.uint8).cpu().numpy(),
        ids=found.ids[keep].to(torch.int32).cpu().numpy(),
        logits=relative[keep].cpu().numpy(),
        lse=lse.cpu().numpy(),
        token_logprobs=(found.label_logits - top[:, 0] - lse[:, 0]).cpu().numpy(),
        vocab_size=vocab_size,
    )


def kept_by_mass(
    relative: torch.Tensor, lse: torch.Tensor, *, top_p: float, filter: str, temperature: float
) -> torch.Tensor:
    """bool [n, k]: of falling logits [n, k] relative to the row's largest, those before which less than top_p of the mass lies.

    lse [n] at T=1. `filter` says of which distribution: `full_vocabulary`, the T=1 probabilities of the whole vocabulary;
    `hugging_face`, as in sampling: temperature, then top-k, then top-p over what is left. The largest is always kept, a logit of
    -inf never.
    """
    if filter == "full_vocabulary":
        probabilities = (relative - lse[:, None]).exp()
    else:
        probabilities = torch.softmax(relative / temperature, 1)
    keep = relative.isfinite()
    if top_p < 1:  # in fp32 the mass before an entry may round to 1
        keep[:, 1:] &= probabilities.cumsum(1)[:, :-1] < top_p
    return keep
