"""The loss in plain torch with a hand-written gradient, a few rows at a time: low in memory, fast on a CPU.

Every row is cut in two. The columns of the stored teacher entries and of the label are a handful: they are gathered and
treated in fp64. The rest ("off the ids") is dense: it is read in chunks of rows that stay in cache, and its log-sum-exps
are taken on their own, relative to its own maximum. The student's tail mass is therefore never computed as 1 - M and keeps
its relative precision however certain the student is.

Bytes moved: each logit is read once forward; read once, and its gradient written once, backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse_kernels.rows import ActiveRows, SparseTarget, VocabularyShard, sparse_target

_CHUNK_ELEMENTS = (
    1 << 19
)  # of one scratch buffer, 2 MB of fp32: in cache, yet few enough calls that threads seldom wait


def chunked_loss(
    logits: Tensor, rows: ActiveRows, temperature: float, tail: str, shard: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, ce, kl [a] from logits [n, v]; differentiable once. Under a group: one all-gather of [a, 5] fp64, forward."""
    return _ChunkedLoss.apply(logits, rows, sparse_target(rows, tail), temperature, shard)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, rows: ActiveRows, target: SparseTarget, temperature: float, shard: VocabularyShard):
        entries = _local_entries(logits, rows, target, shard)
        statistics = _statistics(logits, rows, target, entries, temperature, shard)

        ce = (statistics.lse_1 - statistics.label_logit).where(rows.labels >= 0, 0.0)
        mass, tail = target.mass, statistics.tail
        kl = mass.xlogy(mass).sum(1) - statistics.product / temperature + statistics.total * statistics.lse_t
        kl = kl + tail.xlogy(tail) - (tail * statistics.off_t).where(tail > 0, 0.0)
        # A part without weight may be infinite (a masked logit) and must not turn the sum into NaN.
        loss = (rows.ce_weight * ce).where(rows.ce_weight != 0, 0.0)
        loss = loss + (rows.kl_weight * kl).where(rows.kl_weight != 0, 0.0)

        ctx.save_for_backward(logits)
        ctx.state = (rows, entries, statistics, temperature, shard)
        ctx.set_materialize_grads(False)
        result = torch.promote_types(logits.dtype, torch.float32)
        loss, ce, kl = loss.to(result), ce.to(result), kl.to(result)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _ce, _kl):
        if upstream is None:
            return None, None, None, None, None
        (logits,) = ctx.saved_tensors
        rows, entries, statistics, temperature, shard = ctx.state
        w_ce = upstream.double() * rows.ce_weight
        w_kl = upstream.double() * rows.kl_weight / temperature
        if rows.index is None:
            gradient = torch.empty_like(logits)
            gradient[:, shard.columns :] = 0
        else:
            gradient = torch.zeros_like(logits)
        _write_off_ids(gradient, logits, rows, statistics, w_ce, w_kl, temperature, shard)
        _write_special(gradient, rows, entries, statistics, w_ce, w_kl, temperature)
        return gradient, None, None, None, None


# --- the special columns: gathered, fp64 -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _LocalEntries:
    """Teacher entries and labels whose column lies in this shard; rows ascend."""

    row: Tensor  # [e] among the active rows
    slot: Tensor  # [e]
    column: Tensor  # [e] of the shard
    mass: Tensor  # [e] fp64
    logit: Tensor  # [e] fp64
    is_label: Tensor  # [e] fp64, 1 where the entry is the row's label
    label_row: Tensor  # [at most a]
    label_column: Tensor
    label_logit: Tensor  # fp64


def _local_entries(logits: Tensor, rows: ActiveRows, target: SparseTarget, shard: VocabularyShard) -> _LocalEntries:
    row, slot = _in_shard(target.ids, shard).nonzero(as_tuple=True)
    (label_row,) = _in_shard(rows.labels, shard).nonzero(as_tuple=True)
    ids, label_ids = target.ids[row, slot], rows.labels[label_row]
    return _LocalEntries(
        row=row,
        slot=slot,
        column=ids - shard.start,
        mass=target.mass[row, slot],
        logit=logits[_position(rows, row), ids - shard.start].double(),
        is_label=(ids == rows.labels[row]).double(),
        label_row=label_row,
        label_column=label_ids - shard.start,
        label_logit=logits[_position(rows, label_row), label_ids - shard.start].double(),
    )


def _in_shard(ids: Tensor, shard: VocabularyShard) -> Tensor:
    return (ids >= shard.start) & (ids < shard.start + shard.columns) & (ids >= 0)


def _position(rows: ActiveRows, row: Tensor) -> Tensor:
    """Position among all n rows of a position among the active ones."""
    return row if rows.index is None else rows.index[row]


def _write_special(gradient, rows, entries, statistics, w_ce, w_kl, temperature) -> None:
    """The columns of labels and entries, rounded once from fp64. Labels first: an entry at the label's column wins."""
    lse_1, lse_t, off_t = statistics.lse_1, statistics.lse_t, statistics.off_t
    total, tail = statistics.total, statistics.tail

    row, logit = entries.label_row, entries.label_logit
    p = (logit - lse_1[row]).exp()
    q = (logit / temperature - lse_t[row]).exp()
    r = (logit / temperature - off_t[row]).exp().where(tail[row] > 0, 0.0)
    value = w_ce[row] * (p - 1) + w_kl[row] * (total[row] * q - tail[row] * r)
    gradient[_position(rows, row), entries.label_column] = value.to(gradient.dtype)

    row, logit = entries.row, entries.logit
    p = (logit - lse_1[row]).exp()
    q = (logit / temperature - lse_t[row]).exp()
    value = w_ce[row] * (p - entries.is_label) + w_kl[row] * (total[row] * q - entries.mass)
    gradient[_position(rows, row), entries.column] = value.to(gradient.dtype)


# --- per-row statistics: what the shards tell each other --------------------------------------------------------------


@dataclass(frozen=True)
class _Statistics:
    """Over all shards, [a] fp64 each. Suffix _1: of the logits; suffix _t: of the logits / temperature."""

    lse_1: Tensor  # log-sum-exp over all columns
    lse_t: Tensor
    off_t: Tensor  # log-sum-exp over the columns off the ids
    product: Tensor  # sum mass * logit
    label_logit: Tensor  # 0 where there is no label
    tail: Tensor  # teacher mass off the ids
    total: Tensor  # all teacher mass


def _statistics(logits, rows, target, entries, temperature, shard) -> _Statistics:
    off_1, off_t = _off_ids_logsumexp(logits, rows, entries, temperature, shard)
    # [a, k]; -inf (nothing to add) where the slot is empty or lies in another shard.
    on_ids = torch.full_like(target.mass, -torch.inf)
    on_ids[entries.row, entries.slot] = entries.logit
    product = (entries.mass * entries.logit).where(entries.mass > 0, 0.0)
    lse_1 = torch.logaddexp(off_1, on_ids.logsumexp(1))
    on_t = (on_ids / temperature).logsumexp(1)
    product = torch.zeros_like(off_1).index_add(0, entries.row, product)
    label_logit = torch.zeros_like(off_1).index_put((entries.label_row,), entries.label_logit)

    if shard.group is not None and lse_1.numel() > 0:
        partial = torch.stack((lse_1, off_t, on_t, product, label_logit))
        gathered = partial.new_empty((dist.get_world_size(shard.group) * len(partial), partial.shape[1]))
        dist.all_gather_into_tensor(gathered, partial, group=shard.group)
        gathered = gathered.view(-1, *partial.shape)
        lse_1, off_t, on_t = gathered[:, :3].logsumexp(0)
        product, label_logit = gathered[:, 3:].sum(0)

    # With no column off the ids, rounding may leave a crumb of tail that nothing can hold.
    tail = target.tail.where(off_t != -torch.inf, 0.0)
    total = target.mass.sum(1) + tail
    return _Statistics(lse_1, torch.logaddexp(off_t, on_t), off_t, product, label_logit, tail, total)


# --- the dense part: in chunks of rows --------------------------------------------------------------------------------
#
# exp(z / T - shift) with any shift near the row's largest z / T: the shift is rounded to the buffers' dtype first and that
# rounded value is used in the fp64 arithmetic around it, so its rounding cancels.


def _off_ids_logsumexp(logits, rows, entries, temperature, shard) -> tuple[Tensor, Tensor]:
    """Log-sum-exps [a] fp64 of logits and logits / temperature over this shard's columns that hold no teacher entry."""
    count = rows.labels.numel()
    sum_1, sum_t, shift_1, shift_t = torch.zeros((4, count), dtype=torch.float64, device=logits.device)
    first_entry = torch.searchsorted(entries.row, torch.arange(count + 1, device=logits.device)).tolist()
    for start, stop, x, y in _chunks(logits, rows, shard):
        _read(logits, rows, start, stop, out=x)
        mine = slice(first_entry[start], first_entry[stop])
        x[entries.row[mine] - start, entries.column[mine]] = -torch.inf
        shift = x.amax(1, keepdim=True)
        shift = shift.where(shift != -torch.inf, 0.0)
        shift_1[start:stop] = shift[:, 0]
        if temperature not in (1, 2):
            sum_1[start:stop] = torch.sub(x, shift, out=y).exp_().sum(1)
        shift = shift / temperature
        shift_t[start:stop] = shift[:, 0]
        x.mul_(1 / temperature).sub_(shift).exp_()
        sum_t[start:stop] = x.sum(1)
        if temperature == 1:
            sum_1[start:stop] = sum_t[start:stop]
        elif temperature == 2:  # exp is what costs: square instead of a second one
            sum_1[start:stop] = torch.mul(x, x, out=y).sum(1)
    return shift_1 + sum_1.log(), shift_t + sum_t.log()


def _write_off_ids(gradient, logits, rows, statistics, w_ce, w_kl, temperature, shard) -> None:
    """The gradient of every column as if it were off the ids and not the label: w_ce p + w_kl (total q - tail r)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shift_t = statistics.off_t.where(statistics.off_t != -torch.inf, statistics.lse_t).to(dtype).double()
    # At T = 1 and 2 exp(z - shift_1) is a power of exp(z / T - shift_t); at a large T that power would overflow.
    shift_1 = temperature * shift_t if temperature in (1, 2) else statistics.lse_1.to(dtype).double()
    factor_1 = w_ce * (shift_1 - statistics.lse_1).exp()
    student = statistics.total * (shift_t - statistics.lse_t).exp()
    teacher = (statistics.tail * (shift_t - statistics.off_t).exp()).where(statistics.tail > 0, 0.0)
    factor_t = w_kl * (student - teacher)
    if temperature == 1:
        factor_t = factor_t + factor_1
    columns = (factor_t, factor_1, shift_t, shift_1)
    factor_t, factor_1, shift_t, shift_1 = (column.to(dtype)[:, None] for column in columns)

    in_place = rows.index is None and gradient.dtype == dtype  # no scratch needed: the gradient's rows are their own
    for start, stop, x, y in _chunks(logits, rows, shard):
        if in_place:
            x = gradient[start:stop, : shard.columns]
        _read(logits, rows, start, stop, out=x)
        f_t, f_1 = factor_t[start:stop], factor_1[start:stop]
        if temperature not in (1, 2):
            torch.sub(x, shift_1[start:stop], out=y).exp_().mul_(f_1)
        x.mul_(1 / temperature).sub_(shift_t[start:stop]).exp_()
        if temperature == 1:
            x.mul_(f_t)
        elif temperature == 2:
            x.mul_(torch.mul(x, f_1, out=y).add_(f_t))
        else:
            x.mul_(f_t).add_(y)
        if rows.index is None and not in_place:
            gradient[start:stop, : shard.columns] = x
        elif rows.index is not None:
            gradient[rows.index[start:stop], : shard.columns] = x.to(gradient.dtype)


def _chunks(logits: Tensor, rows: ActiveRows, shard: VocabularyShard) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """start, stop among the active rows, and two scratch buffers [stop - start, columns], the same memory every time."""
    count = rows.labels.numel()
    if shard.columns == 0 or count == 0:
        return
    size = min(max(1, _CHUNK_ELEMENTS // shard.columns), count)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x, y = torch.empty((2, size, shard.columns), dtype=dtype, device=logits.device)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield start, stop, x[: stop - start], y[: stop - start]


def _read(logits: Tensor, rows: ActiveRows, start: int, stop: int, out: Tensor) -> None:
    if rows.index is None:
        out.copy_(logits[start:stop, : out.shape[1]])
    else:
        out.copy_(logits[rows.index[start:stop], : out.shape[1]])
