"""From logits to sparse distributions: the likeliest entries, and what makes the rest of the mass exact.

Everything is relative to the row's largest logit, in fp32. With z the logits, r = z - max z and lse_T = log sum_v exp(r_v / T) over
the WHOLE vocabulary, log p_T(v) = r_v / T - lse_T for every captured temperature T: the tail's mass at T=2 cannot be had from
probabilities at T=1.

Legend: n rows, v vocabulary, k stored entries, t temperatures, e entries of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Logits treated at once: on a CPU what stays in its cache (2.7 times faster than 2**25), on a GPU what keeps it busy.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**26


@dataclass(frozen=True)
class SparseRows:
    """counts uint8 [n]: entries of each row; ids int32 [e] and relative logits float32 [e], falling within a row;
    lse float32 [n, 1 + t] at T = 1 and at every temperature; token_logprobs float32 [n]: log p_1 of the token that came."""

    counts: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    lse: np.ndarray
    token_logprobs: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["SparseRows"]) -> "SparseRows":
        names = ("counts", "ids", "logits", "lse", "token_logprobs")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


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

    Kept are the top_k largest; of these, those before which less than top_p of the mass lies. `filter` says of which distribution:
    `full_vocabulary`, the T=1 probabilities of the whole vocabulary; `hugging_face`, as in sampling with the first temperature:
    temperature, then top-k, then top-p over what is left. The largest is always kept. Raises NotFiniteError.
    """
    rows = max((_CPU_CHUNK if logits.device.type == "cpu" else _GPU_CHUNK) // logits.shape[1], 1)
    parts = []
    for first in range(0, max(len(logits), 1), rows):
        chunk = logits[first : first + rows].float()
        largest, ids = chunk.topk(min(top_k, chunk.shape[1]), dim=1)
        # topk puts NaN and +inf first; a largest of -inf means that the whole row is.
        finite = largest[:, :1].isfinite()
        if not finite.all():
            raise NotFiniteError(first + int((~finite[:, 0]).nonzero()[0]))
        relative = largest - largest[:, :1]
        chunk = chunk - largest[:, :1]
        lse = torch.stack([torch.logsumexp(chunk / t if t != 1 else chunk, 1) for t in (1.0, *temperatures)], 1)
        token_logprobs = chunk.gather(1, tokens[first : first + rows, None])[:, 0] - lse[:, 0]
        if filter == "full_vocabulary":
            probabilities = (relative - lse[:, :1]).exp()
        else:
            probabilities = torch.softmax(relative / temperatures[0], 1)
        before = probabilities.cumsum(1)[:, :-1]
        keep = relative.isfinite()
        keep[:, 1:] &= before < top_p
        parts.append(
            SparseRows(
                counts=keep.sum(1).to(torch.uint8).cpu().numpy(),
                ids=ids[keep].to(torch.int32).cpu().numpy(),
                logits=relative[keep].cpu().numpy(),
                lse=lse.cpu().numpy(),
                token_logprobs=token_logprobs.cpu().numpy(),
            )
        )
    return SparseRows.join(parts)
