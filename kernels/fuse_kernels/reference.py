"""The loss written densely, for tests: a teacher tensor as large as the logits and plain autograd.

It shares nothing with the fast implementations but the choice of rows: it merges no repeats and has no
unified target. So an error in the shared mathematics cannot hide in both.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fuse_kernels.rows import ActiveRows, LossOptions, TokenLosses, VocabularyShard


def reference_loss(
    logits: Tensor, rows: ActiveRows, options: LossOptions, shard: VocabularyShard
) -> TokenLosses:
    """The losses [a] each of logits [n, v], in the precision of the logits (half types in fp32).

    Under tensor parallelism every rank gathers the whole vocabulary: one all-gather of the logits. Shards
    must be equally wide and in rank order.
    Raises ValueError if this rank's shard is not at its place in that order.
    """
    if shard.group is not None:
        width, rank = logits.shape[1], dist.get_rank(shard.group)
        if shard.start != rank * width:
            raise ValueError(
                f"vocab_start is {shard.start}, but rank {rank} with {width} columns needs {rank * width}"
            )
        logits = _GatherVocabulary.apply(logits, shard.group)
    logits = logits if rows.index is None else logits[rows.index]
    z = logits[:, : shard.vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    if options.softcap is not None:
        z = torch.where(z.isinf(), z, options.softcap * torch.tanh(z / options.softcap))
    zero = z.new_zeros(())

    has_label = rows.labels >= 0
    ce = -z.log_softmax(1).gather(1, rows.labels.clamp(min=0)[:, None])[:, 0]
    ce = torch.where(has_label, ce, zero)

    live = rows.teacher_ids >= 0
    ids = rows.teacher_ids.clamp(min=0)
    teacher = torch.zeros_like(z).scatter_add(
        1, ids, rows.teacher_logprobs.to(z.dtype).exp().where(live, zero)
    )
    stored_columns = torch.zeros_like(z).scatter_add(1, ids, live.to(z.dtype)) > 0
    m = teacher.sum(1)
    likeliest = stored_columns & (teacher == teacher.amax(1, keepdim=True))
    agreement = z.masked_fill(~likeliest, -torch.inf).amax(1) >= z.amax(1)
    if options.tail == "renormalize":
        teacher = teacher / m.where(m > 0, 1)[:, None]
    log_q = (z / options.temperature).log_softmax(1)
    kl = (teacher.xlogy(teacher) - torch.where(teacher > 0, teacher * log_q, zero)).sum(1)
    if options.tail == "bucket":
        # A row without any column off the ids has no tail.
        # Its mask is lifted, because logsumexp(-inf ...) has no gradient.
        covered = stored_columns.all(1)
        log_student_tail = log_q.masked_fill(stored_columns & ~covered[:, None], -torch.inf).logsumexp(1)
        left = (1 - m).clamp(min=0).where(~covered, zero)
        kl = kl + left.xlogy(left) - left * log_student_tail
    has_teacher = live.any(1)
    kl = torch.where(has_teacher, kl, zero)
    loss = rows.ce_weight.to(z.dtype) * ce + rows.kl_weight.to(z.dtype) * kl
    student_mass = torch.where(stored_columns, log_q.exp(), zero).sum(1)
    agreement = (agreement & (m > 0)).to(z.dtype)
    return TokenLosses(loss, *(values.detach() for values in (ce, kl, m, student_mass, agreement)))


class _GatherVocabulary(torch.autograd.Function):
    """[n, v] on each rank -> [n, ranks * v] on all ranks.

    One all-gather forward; backward takes this rank's columns.

    Backward does not sum over ranks: every rank computes the same loss from the same gathered logits, so that
    its gradient is complete.
    """

    @staticmethod
    def forward(ctx, logits, group):
        ctx.first, ctx.width = dist.get_rank(group) * logits.shape[1], logits.shape[1]
        shards = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, logits.contiguous(), group=group)
        return torch.cat(shards, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, ctx.first : ctx.first + ctx.width], None
