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

# Logits treated at once: on a CPU what stays in its cache (2.7 times faster than 2**25), on a GPU what keeps it busy.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**26
# Columns of which only the largest is compared at first: the k largest logits lie in the k blocks with the largest maxima.
_BLOCK = 128


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
        names = ("counts", "ids", "logits", "lse", "token_logprobs")
        arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return cls(*arrays, vocab_size=max(part.vocab_size for part in parts))

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
    Besides the logits, only one scratch of a few MB (CPU) or 256 MB (GPU) is needed.
    """
    size, vocab_size = logits.shape
    rows = min(max((_CPU_CHUNK if logits.device.type == "cpu" else _GPU_CHUNK) // vocab_size, 1), max(size, 1))
    width = -(-vocab_size // _BLOCK) * _BLOCK
    scratch = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    parts = []
    for first in range(0, max(size, 1), rows):
        chunk = logits[first : first + rows]
        values = scratch[: len(chunk)]
        values[:, :vocab_size] = chunk
        values[:, vocab_size:] = -torch.inf
        came = values.gather(1, tokens[first : first + rows, None])[:, 0]
        largest, ids = _largest(values, min(top_k, vocab_size))
        top = largest[:, :1]
        lse = _logsumexps(values.sub_(top), temperatures)
        bad = ~lse[:, 0].isfinite()  # the sum meets every NaN and +inf; and of all -inf there is no relative logit
        if bad.any():
            raise NotFiniteError(first + int(bad.nonzero()[0]))
        relative = largest - top
        keep = kept_by_mass(relative, lse[:, 0], top_p=top_p, filter=filter, temperature=temperatures[0])
        parts.append(
            SparseRows(
                counts=keep.sum(1).to(torch.uint8).cpu().numpy(),
                ids=ids[keep].to(torch.int32).cpu().numpy(),
                logits=relative[keep].cpu().numpy(),
                lse=lse.cpu().numpy(),
                token_logprobs=(came - top[:, 0] - lse[:, 0]).cpu().numpy(),
                vocab_size=vocab_size,
            )
        )
    return SparseRows.join(parts)


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


def _largest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of values [n, a multiple of _BLOCK], falling, and their columns: (float32 [n, k], int64 [n, k]).

    Blocks are ranked by (maximum, lower number) and columns by (value, lower number). If a column among the first k lay in no
    block among the first k, each of those would hold a column that ranks before it.
    """
    blocks = values.view(len(values), values.shape[1] // _BLOCK, _BLOCK)
    maxima = blocks.amax(2)
    numbers = torch.arange(blocks.shape[1], device=values.device)
    best = _rank_keys(maxima, numbers).topk(min(k, blocks.shape[1]), 1).indices[:, :, None]
    candidates = blocks.gather(1, best.expand(-1, -1, _BLOCK)).flatten(1)
    columns = (best * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    chosen = _rank_keys(candidates, columns).topk(k, 1).indices
    return candidates.gather(1, chosen), columns.gather(1, chosen)


def _rank_keys(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 keys, all different, that order as (value, lower number first): the bits of a float, read as a whole number, order as
    the float does, those of a negative one the other way round."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 equals 0.0
    return ((bits ^ ((bits >> 63) & 0x7FFFFFFF)) << 32) - numbers


def _logsumexps(relative: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """float32 [n, 1 + t] at T = 1 and at every temperature, of logits [n, width] relative to the largest; may overwrite them.

    The exponential is what costs: one serves T = 2 and T = 1 together, for exp(r / 2)^2 = exp(r).
    """
    distinct = list(dict.fromkeys([1.0, *temperatures]))
    sums = {}
    if distinct == [1.0, 2.0]:
        exponentials = relative.div_(2.0).exp_()
        sums[2.0] = exponentials.sum(1)
        sums[1.0] = exponentials.square_().sum(1)
    else:
        for temperature in distinct:
            sums[temperature] = (relative / temperature).exp_().sum(1)
    return torch.stack([sums[temperature] for temperature in (1.0, *temperatures)], 1).log_()
