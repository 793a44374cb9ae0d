"""The inputs that all implementations share:
the vocabulary shard, the active rows, the teacher's sparse target."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

OVERWRITTEN = (
    "the gradient of the logits was written over the logits, and the first backward pass has used it up, so "
    'a second one is not possible. Run the forward pass again, or use implementation="reference", which '
    "keeps the logits."
)


@dataclass(frozen=True)
class LossOptions:
    """Which loss it is; see `sparse_kl_cross_entropy`."""

    temperature: float
    tail: str
    softcap: float | None


class TokenLosses(NamedTuple):
    """The losses of every row, [n] each, in fp32 (fp64 for fp64 logits). Only `loss` is differentiable.

    The last three fields say how well student and teacher of a row agree.
    They are 0 if the row has no teacher.
    """

    loss: Tensor  # weighted
    ce: Tensor  # unweighted, 0 without a label
    kl: Tensor  # unweighted, 0 without a teacher
    teacher_mass: Tensor  # of the stored entries, before any renormalisation
    student_mass: Tensor  # of softmax(logits / T) on the stored ids
    agreement: Tensor  # 1 if no logit is above that of the teacher's likeliest entry, else 0


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary: its first `columns` columns are the global ids start ... start +
    columns - 1."""

    start: int
    columns: int  # without padding; 0 if the whole shard is padding
    vocab_size: int  # columns of all shards, without padding
    group: dist.ProcessGroup | None  # None if one rank holds the whole vocabulary


@dataclass(frozen=True)
class ActiveRows:
    """The arguments of the loss for the active rows: those with a weight other than 0. The same on every rank
    of a group."""

    # [a] positions among the n rows; None if all rows are active, so that no gather is needed.
    index: Tensor | None
    count: int  # n
    labels: Tensor  # [a] int64, -100 = none
    teacher_ids: Tensor  # [a, k] int64, -1 = empty
    teacher_logprobs: Tensor  # [a, k]
    ce_weight: Tensor  # [a] fp64, 0 without a label
    kl_weight: Tensor  # [a] fp64, 0 without a teacher entry

    def part(self, start: int, stop: int) -> "ActiveRows":
        """The active rows start ... stop - 1, as if they were all rows."""
        everything = (self.labels, self.teacher_ids, self.teacher_logprobs, self.ce_weight, self.kl_weight)
        return ActiveRows(None, stop - start, *(tensor[start:stop] for tensor in everything))


def active_rows(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight) -> ActiveRows:
    """Drops the rows in which no weight counts, so that their loss is 0.

    Arguments and shapes as in `sparse_kl_cross_entropy`.

    A weight counts only if the row has a label (CE) or a teacher entry (KL).
    """
    ce_weight = ce_weight.detach().double().where(labels >= 0, 0.0)
    kl_weight = kl_weight.detach().double().where((teacher_ids >= 0).any(1), 0.0)
    everything = (labels.long(), teacher_ids.long(), teacher_logprobs.detach(), ce_weight, kl_weight)
    active = (ce_weight != 0) | (kl_weight != 0)
    if active.all():
        return ActiveRows(None, len(labels), *everything)
    index = active.nonzero()[:, 0]
    return ActiveRows(index, len(labels), *(tensor[index] for tensor in everything))


def spread(losses: TokenLosses, rows: ActiveRows) -> TokenLosses:
    """Losses [a] each of the active rows -> [n] each of all rows, 0 in skipped rows."""
    if rows.index is None:
        return losses
    return TokenLosses(*(values.new_zeros(rows.count).index_copy(0, rows.index, values) for values in losses))


@dataclass(frozen=True)
class SparseTarget:
    """The distribution that the student learns from the teacher: mass on the stored ids, and residual mass
    (tail) off them.

    q is the student's softmax over all columns, r its softmax over the columns off the ids. Each of the three
    tails is
        D = sum mass log(mass / q) + tail log(tail / q(off the ids))
    with other values of `mass` and `tail`. Its gradient, without the factor 1 / T of the temperature, is
        (sum mass + tail) q_j - mass_j      on the ids
        (sum mass + tail) q_j - tail r_j    off the ids
    """

    ids: Tensor  # [a, k] int64, no id twice in a row, -1 = empty
    mass: Tensor  # [a, k] fp64, 0 in empty slots
    stored: Tensor  # [a] fp64, the sum of the masses before any renormalisation
    tail: Tensor  # [a] fp64, the teacher's mass off the ids; 0 in a row without entries, so that its D is 0


def sparse_target(rows: ActiveRows, tail: str) -> SparseTarget:
    """The target under one of the three tails ("bucket", "renormalize", "ignore"), with repeated ids merged.

    In fp64: 1 - m loses its digits in fp32 if the teacher is nearly certain. These tensors are small, so that
    fp64 is cheap.
    """
    live = rows.teacher_ids >= 0
    # `where`, not a product: empty slots may hold NaN.
    mass = rows.teacher_logprobs.double().exp().where(live, 0.0)
    ids, mass = _merge_repeats(rows.teacher_ids, mass)
    stored = mass.sum(1)
    left = torch.zeros_like(stored)
    if tail == "renormalize":
        mass = mass / stored.where(stored > 0, 1.0)[:, None]
    elif tail == "bucket":
        left = (1 - stored).clamp(min=0).where(live.any(1), 0.0)
    return SparseTarget(ids, mass, stored, left)


def _merge_repeats(ids: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """[a, k] each: every id once per row, with the sum of its mass. The slots of its repeats become empty."""
    # Sorted, equal ids are neighbours.
    # `slot` counts the different ids so far, so that equal ids share a slot.
    ids, order = ids.sort(dim=1)
    first = torch.ones_like(ids)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = first.cumsum(1) - 1
    # Equal slots receive equal ids: the order of the writes does not matter.
    merged = torch.full_like(ids, -1).scatter(1, slot, ids)
    return merged, torch.zeros_like(mass).scatter_add(1, slot, mass.gather(1, order))
