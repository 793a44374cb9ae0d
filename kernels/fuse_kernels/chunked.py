"""The loss in plain torch with a hand-written gradient, a few rows at a time: low in memory, fast on a CPU.

Every row is cut in two. The columns of the stored teacher entries and of the label are a handful: they are gathered and
treated in fp64. The rest ("off the ids") is dense: it is read in chunks of rows that stay in cache, and its log-sum-exps
are taken on their own, relative to its own maximum. The student's tail mass is therefore never computed as 1 - M and keeps
its relative precision however certain the student is.

The gradient is written over the logits. Bytes moved: each logit is read once forward, read and written once backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse_kernels.rows import OVERWRITTEN, ActiveRows, SparseTarget, VocabularyShard, sparse_target

# Of a scratch buffer: on a CPU per thread, as two of 512 KB in fp32 stay in a core's own cache; on a GPU what keeps it busy.
_CPU_CHUNK, _GPU_CHUNK = 1 << 17, 1 << 26
_POWERS = (1, 2, 4)  # temperatures at which exp(z) is a power of exp(z / T) that is cheaper than a second exponential


def chunked_loss(
    logits: Tensor, rows: ActiveRows, temperature: float, tail: str, shard: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, ce, kl [a] from logits [n, v], over which backward writes the gradient."""
    return _ChunkedLoss.apply(logits, rows, temperature, tail, shard)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, rows: ActiveRows, temperature: float, tail: str, shard: VocabularyShard):
        (loss, ce, kl), ctx.state = chunked_losses(logits, rows, temperature, tail, shard)
        ctx.save_for_backward(logits)
        ctx.overwritten = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _ce, _kl):
        nothing = (None,) * 4
        if upstream is None:
            return None, *nothing
        if ctx.overwritten:
            raise RuntimeError(OVERWRITTEN)
        ctx.overwritten = True
        (logits,) = ctx.saved_tensors
        chunked_gradient_(logits, upstream, ctx.state)
        return logits, *nothing


@dataclass(frozen=True)
class ChunkedState:
    """What the gradient takes from the forward pass, beside the logits."""

    rows: ActiveRows
    entries: "_LocalEntries"
    statistics: "_Statistics"
    temperature: float
    shard: VocabularyShard


def chunked_losses(
    logits: Tensor, rows: ActiveRows, temperature: float, tail: str, shard: VocabularyShard
) -> tuple[tuple[Tensor, Tensor, Tensor], ChunkedState]:
    """loss, ce, kl [a] from logits [n, v], which stay as they are. Under a group: one all-gather of [a, 5] fp64."""
    target = sparse_target(rows, tail)
    entries = _local_entries(logits, rows, target, shard)
    statistics = _statistics(logits, rows, target, entries, temperature, shard)

    ce = (statistics.lse_1 - statistics.label_logit).where(rows.labels >= 0, 0.0)
    mass, left = target.mass, statistics.tail
    kl = mass.xlogy(mass).sum(1) - statistics.product / temperature + statistics.total * statistics.lse_t
    kl = kl + left.xlogy(left) - (left * statistics.off_t).where(left > 0, 0.0)
    # A part without weight may be infinite (a masked logit) and must not turn the sum into NaN.
    loss = (rows.ce_weight * ce).where(rows.ce_weight != 0, 0.0)
    loss = loss + (rows.kl_weight * kl).where(rows.kl_weight != 0, 0.0)
    result = torch.promote_types(logits.dtype, torch.float32)
    losses = loss.to(result), ce.to(result), kl.to(result)
    return losses, ChunkedState(rows, entries, statistics, temperature, shard)


def chunked_gradient_(logits: Tensor, upstream: Tensor, state: ChunkedState) -> None:
    """Writes the gradient of sum(upstream [a] * loss) over the logits [n, v]."""
    rows, statistics, temperature = state.rows, state.statistics, state.temperature
    w_ce = upstream.double() * rows.ce_weight
    w_kl = upstream.double() * rows.kl_weight / temperature
    if rows.index is not None:
        skipped = torch.ones(rows.count, dtype=torch.bool, device=logits.device)
        skipped[rows.index] = False
        logits[skipped] = 0
    logits[:, state.shard.columns :] = 0
    _write_off_ids(logits, rows, statistics, w_ce, w_kl, temperature, state.shard)
    _write_special(logits, rows, state.entries, statistics, w_ce, w_kl, temperature)


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


def _write_special(logits, rows, entries, statistics, w_ce, w_kl, temperature) -> None:
    """The columns of labels and entries, rounded once from fp64. Labels first: an entry at the label's column wins."""
    lse_1, lse_t, off_t = statistics.lse_1, statistics.lse_t, statistics.off_t
    total, tail = statistics.total, statistics.tail

    row, logit = entries.label_row, entries.label_logit
    p = (logit - lse_1[row]).exp()
    q = (logit / temperature - lse_t[row]).exp()
    r = (logit / temperature - off_t[row]).exp().where(tail[row] > 0, 0.0)
    value = w_ce[row] * (p - 1) + w_kl[row] * (total[row] * q - tail[row] * r)
    logits[_position(rows, row), entries.label_column] = value.to(logits.dtype)

    row, logit = entries.row, entries.logit
    p = (logit - lse_1[row]).exp()
    q = (logit / temperature - lse_t[row]).exp()
    value = w_ce[row] * (p - entries.is_label) + w_kl[row] * (total[row] * q - entries.mass)
    logits[_position(rows, row), entries.column] = value.to(logits.dtype)


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
    for start, stop, x, _ in _chunks(logits, rows, shard):
        mine = slice(first_entry[start], first_entry[stop])
        on_ids = entries.row[mine] - start, entries.column[mine]

        def exponentials(scale: float, start=start, stop=stop, x=x, on_ids=on_ids) -> Tensor:
            """exp(scale z - shift) in x; returns the shift [rows]."""
            _read(logits, rows, start, stop, scale, out=x)
            x[on_ids] = -torch.inf
            shift = x.amax(1, keepdim=True)
            shift = shift.where(shift != -torch.inf, 0.0)
            x.sub_(shift).exp_()
            return shift[:, 0]

        if temperature not in _POWERS:
            shift_1[start:stop] = exponentials(1.0)
            sum_1[start:stop] = x.sum(1)
        shift_t[start:stop] = exponentials(1 / temperature)
        sum_t[start:stop] = x.sum(1)
        if temperature in _POWERS:
            for _ in range(_POWERS.index(temperature)):
                x.mul_(x)
            shift_1[start:stop] = temperature * shift_t[start:stop]
            sum_1[start:stop] = sum_t[start:stop] if temperature == 1 else x.sum(1)
    return shift_1 + sum_1.log(), shift_t + sum_t.log()


def _write_off_ids(logits, rows, statistics, w_ce, w_kl, temperature, shard) -> None:
    """The gradient of every column as if it were off the ids and not the label: w_ce p + w_kl (total q - tail r)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shift_t = statistics.off_t.where(statistics.off_t != -torch.inf, statistics.lse_t).to(dtype).double()
    # A power of exp(z / T - shift_t) is exp(z - T shift_t); at a large T that could overflow.
    shift_1 = temperature * shift_t if temperature in _POWERS else statistics.lse_1.to(dtype).double()
    factor_1 = w_ce * (shift_1 - statistics.lse_1).exp()
    student = statistics.total * (shift_t - statistics.lse_t).exp()
    teacher = (statistics.tail * (shift_t - statistics.off_t).exp()).where(statistics.tail > 0, 0.0)
    factor_t = w_kl * (student - teacher)
    if temperature == 1:
        factor_t = factor_t + factor_1
    columns = (factor_t, factor_1, shift_t, shift_1)
    factor_t, factor_1, shift_t, shift_1 = (column.to(dtype)[:, None] for column in columns)

    in_place = rows.index is None and logits.dtype == dtype
    for start, stop, x, y in _chunks(logits, rows, shard):
        f_t, f_1 = factor_t[start:stop], factor_1[start:stop]
        if temperature not in _POWERS:
            _read(logits, rows, start, stop, 1.0, out=y)
            y.sub_(shift_1[start:stop]).exp_().mul_(f_1)
        _read(logits, rows, start, stop, 1 / temperature, out=x)
        x.sub_(shift_t[start:stop]).exp_()
        gradient = logits[start:stop, : shard.columns] if in_place else x
        if temperature == 1:
            torch.mul(x, f_t, out=gradient)
        elif temperature == 2:
            torch.mul(x, torch.mul(x, f_1, out=y).add_(f_t), out=gradient)
        elif temperature == 4:
            torch.mul(x, torch.mul(x, x, out=y).mul_(x).mul_(f_1).add_(f_t), out=gradient)
        else:
            torch.addcmul(y, x, f_t, out=gradient)
        if not in_place:
            place = slice(start, stop) if rows.index is None else rows.index[start:stop]
            logits[place, : shard.columns] = x.to(logits.dtype)


def _chunks(logits: Tensor, rows: ActiveRows, shard: VocabularyShard) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """start, stop among the active rows, and two scratch buffers [stop - start, columns], the same memory every time."""
    count = rows.labels.numel()
    if shard.columns == 0 or count == 0:
        return
    elements = _CPU_CHUNK * torch.get_num_threads() if logits.device.type == "cpu" else _GPU_CHUNK
    size = min(max(1, elements // shard.columns), count)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x, y = torch.empty((2, size, shard.columns), dtype=dtype, device=logits.device)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield start, stop, x[: stop - start], y[: stop - start]


def _read(logits: Tensor, rows: ActiveRows, start: int, stop: int, scale: float, out: Tensor) -> None:
    """scale times the logits of the active rows start ... stop - 1, in the dtype of `out`."""
    part = logits[start:stop] if rows.index is None else logits[rows.index[start:stop]]
    part = part[:, : out.shape[1]]
    if part.dtype == out.dtype:
        torch.mul(part, scale, out=out)
    else:  # a product of half types would be rounded before it is stored
        out.copy_(part).mul_(scale)
