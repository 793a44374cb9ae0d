"""What every implementation starts from: the shard of the vocabulary, the rows that take part, the teacher's target."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

OVERWRITTEN = (
    "the logits' gradient was written over the logits and given away in the first backward pass, so that there can be no second: "
    'run the forward pass again, or use implementation="reference", which keeps the logits'
)


class TokenLosses(NamedTuple):
    """What is known of every row, [n] each, in fp32 (fp64 for fp64 logits). Only `loss` is differentiable.

    The last three describe how a row's teacher and student fit each other; they are 0 where there is no teacher.
    """

    loss: Tensor  # weighted
    ce: Tensor  # unweighted, 0 where there is no label
    kl: Tensor  # unweighted, 0 where there is no teacher
    teacher_mass: Tensor  # of the stored entries, before any renormalisation
    student_mass: Tensor  # of softmax(logits / T) on the stored ids
    agreement: Tensor  # 1 where no logit is above that of the teacher's likeliest entry, else 0


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary: its first `columns` columns are the global ids start ... start + columns - 1."""

    start: int
    columns: int  # real columns, without padding; 0 where the whole shard is padding
    vocab_size: int  # real columns over all shards
    group: dist.ProcessGroup | None  # None where one rank holds everything


@dataclass(frozen=True)
class ActiveRows:
    """The arguments of the loss, only the rows that contribute to it; the same on every rank of a group."""

    index: Tensor | None  # [a] positions among the n rows; None where all take part, so that nothing needs gathering
    count: int  # n
    labels: Tensor  # [a] int64, -100 = none
    teacher_ids: Tensor  # [a, k] int64, -1 = empty
    teacher_logprobs: Tensor  # [a, k]
    ce_weight: Tensor  # [a] fp64, 0 where there is no label
    kl_weight: Tensor  # [a] fp64, 0 where there is no teacher entry

    def part(self, start: int, stop: int) -> "ActiveRows":
        """The active rows start ... stop - 1 as if there were no others, none of them skipped."""
        everything = (self.labels, self.teacher_ids, self.teacher_logprobs, self.ce_weight, self.kl_weight)
        return ActiveRows(None, stop - start, *(tensor[start:stop] for tensor in everything))


def active_rows(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight) -> ActiveRows:
    """Drops the rows whose loss is 0 by its weights; arguments and shapes as in `sparse_kl_cross_entropy`."""
    ce_weight = ce_weight.detach().double().where(labels >= 0, 0.0)
    kl_weight = kl_weight.detach().double().where((teacher_ids >= 0).any(1), 0.0)
    everything = (labels.long(), teacher_ids.long(), teacher_logprobs.detach(), ce_weight, kl_weight)
    active = (ce_weight != 0) | (kl_weight != 0)
    if active.all():
        return ActiveRows(None, len(labels), *everything)
    index = active.nonzero()[:, 0]
    return ActiveRows(index, len(labels), *(tensor[index] for tensor in everything))


def spread(losses: TokenLosses, rows: ActiveRows) -> TokenLosses:
    """[a] -> [n] each, 0 in skipped rows."""
    if rows.index is None:
        return losses
    return TokenLosses(*(values.new_zeros(rows.count).index_copy(0, rows.index, values) for values in losses))


@dataclass(frozen=True)
class SparseTarget:
    """The teacher's distribution as the student is asked to match it.

    With q the student's softmax over all columns and r its softmax over the columns off the ids, every form of the
    divergence is  D = sum mass log(mass / q) + tail log(tail / q(off the ids))  and has, before the 1 / T of the
    temperature, the gradient  (sum mass + tail) q_j - mass_j  on the ids and  (sum mass + tail) q_j - tail r_j  off them.
    """

    ids: Tensor  # [a, k] int64, no id twice in a row, -1 = empty
    mass: Tensor  # [a, k] fp64, 0 in empty slots
    stored: Tensor  # [a] fp64, the sum of the masses before any renormalisation
    tail: Tensor  # [a] fp64, mass that belongs somewhere off the ids; 0 in a row without entries, so that its D is 0


def sparse_target(rows: ActiveRows, tail: str) -> SparseTarget:
    """Mass and tail under one of the three tails ("bucket", "renormalize", "ignore"), repeats merged.

    In fp64: 1 - m loses its digits in fp32 when the teacher is nearly certain, and these tensors are small.
    """
    live = rows.teacher_ids >= 0
    mass = rows.teacher_logprobs.double().exp().where(live, 0.0)  # `where`, not a product: empty slots may hold NaN
    ids, mass = _merge_repeats(rows.teacher_ids, mass)
    stored = mass.sum(1)
    left = torch.zeros_like(stored)
    if tail == "renormalize":
        mass = mass / stored.where(stored > 0, 1.0)[:, None]
    elif tail == "bucket":
        left = (1 - stored).clamp(min=0).where(live.any(1), 0.0)
    return SparseTarget(ids, mass, stored, left)


def _merge_repeats(ids: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """[a, k] each: every id once per row with the sum of its mass, freed slots empty."""
    ids, order = ids.sort(dim=1)
    first = torch.ones_like(ids)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = first.cumsum(1) - 1
    merged = torch.full_like(ids, -1).scatter(1, slot, ids)  # equal slots receive equal ids: the order cannot matter
    return merged, torch.zeros_like(mass).scatter_add(1, slot, mass.gather(1, order))
