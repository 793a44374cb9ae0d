"""Makes sparse distributions of logits: the likeliest entries, and the sums that make the tail's mass exact.

Everything is in fp32 and relative to the row's largest logit. Let z be the logits, r = z - max z, and

    lse_T = log sum_v exp(r_v / T)    over the WHOLE vocabulary.

Then log p_T(v) = r_v / T - lse_T. lse_T is stored for every captured temperature T, because the tail's mass
at T=2 cannot be computed from probabilities at T=1.

Entries are in falling order of logit, and equal logits in rising order of id. So the entries of a row depend
on its logits alone, not on the other rows, the number of threads or the device.

Legend: n rows, v vocabulary, k stored entries, t temperatures, e entries of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fuse_kernels import TopK, topk_logsumexp

from megatron_fuse import ragged


@dataclass(frozen=True)
class SparseRows:
    """Sparse distributions of n rows, concatenated.

    counts uint8 [n]: entries of each row. ids int32 [e], logits float32 [e]: the entries; logits are relative
    to the largest and fall within a row. lse float32 [n, 1 + t]: log-sum-exp at T = 1 and at every
    temperature. token_logprobs float32 [n]: log p_1 of the text's token. vocab_size: columns of the model's
    logits, 0 if there is no row.
    """

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
        """Parts with these numbers of rows."""
        entries = np.diff(ragged.offsets(self.counts)[ragged.offsets(lengths)])  # of each part
        by_row = (ragged.split(array, lengths) for array in (self.counts, self.lse, self.token_logprobs))
        by_entry = (ragged.split(array, entries) for array in (self.ids, self.logits))
        return [
            SparseRows(counts, ids, logits, lse, token_logprobs, self.vocab_size)
            for counts, lse, token_logprobs, ids, logits in zip(*by_row, *by_entry, strict=True)
        ]


class NotFiniteError(Exception):
    """The logits of one row contain NaN or infinity."""

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
    """The sparse form of logits [n, v] of any float type.

    tokens int64 [n]: the tokens of the text at these rows.

    The top_k largest entries are kept, and of these the ones that `kept_by_mass` selects. Memory: besides the
    logits and the entries, `fuse_kernels.topk_logsumexp` needs a few MB (CPU) or nothing (GPU).
    Raises NotFiniteError if a row contains NaN or infinity.
    """
    vocab_size = logits.shape[1]
    largest = topk_logsumexp(logits, min(top_k, vocab_size), (1.0, *temperatures), labels=tokens)
    return sparse_rows_of(largest, vocab_size, top_p=top_p, filter=filter, temperatures=temperatures)


def sparse_rows_of(
    largest: TopK, vocab_size: int, *, top_p: float, filter: str, temperatures: Sequence[float]
) -> SparseRows:
    """The sparse form of rows, of their largest logits and their log-sum-exps at T = 1 and `temperatures`.

    largest: with the logits of the text's tokens as label_logits.
    Raises NotFiniteError as sparse_rows does.
    """
    top, lse = largest.logits[:, :1], largest.relative_lse
    # Every NaN or +inf in a row makes its sum not finite. So does a
    # row of -inf, which has no relative logits.
    bad = ~lse[:, 0].isfinite()
    if bad.any():
        raise NotFiniteError(int(bad.nonzero()[0]))
    relative = largest.logits - top
    assert largest.label_logits is not None  # labels are given
    keep = kept_by_mass(relative, lse[:, 0], top_p=top_p, filter=filter, temperature=temperatures[0])
    return SparseRows(
        counts=keep.sum(1).to(torch.uint8).cpu().numpy(),
        ids=largest.ids[keep].to(torch.int32).cpu().numpy(),
        logits=relative[keep].cpu().numpy(),
        lse=lse.cpu().numpy(),
        token_logprobs=(largest.label_logits - top[:, 0] - lse[:, 0]).cpu().numpy(),
        vocab_size=vocab_size,
    )


def kept_by_mass(
    relative: torch.Tensor, lse: torch.Tensor, *, top_p: float, filter: str, temperature: float
) -> torch.Tensor:
    """bool [n, k]: whether each entry is kept: the entries before it have less than top_p of the mass.

    relative [n, k]: falling logits, relative to the row's largest. lse [n]: at T=1. filter: the distribution
    that counts. `full_vocabulary`: the T=1 probabilities over the whole vocabulary. `hugging_face`: as in
    sampling, first temperature, then top-k, then top-p over the rest. The largest entry is always kept, and
    an entry with logit -inf never.
    """
    if filter == "full_vocabulary":
        probabilities = (relative - lse[:, None]).exp()
    else:
        probabilities = torch.softmax(relative / temperature, 1)
    keep = relative.isfinite()
    if top_p < 1:  # skipped for top_p = 1, because in fp32 the mass before an entry may round to 1
        keep[:, 1:] &= probabilities.cumsum(1)[:, :-1] < top_p
    return keep
