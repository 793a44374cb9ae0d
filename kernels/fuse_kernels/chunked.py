"""The loss in plain torch with a hand-written gradient, a few rows at a time: low in memory, fast on a CPU.

Every row is cut in two. The columns of the stored teacher entries and of the label are a handful: they are
gathered, in fp64. All other columns ("off the ids") are dense: they are read in chunks of rows that stay in
the cache. Their log-sum-exps are relative to their own maximum. So the student's residual mass (tail) is
never computed as 1 - M, with M its mass on the ids.
It keeps its relative precision however certain the student is.

The gradient is written over the logits. If the forward pass writes it, from the exponentials that it has just
summed, each logit is read once and written once.
Else each logit is read once forward, and read and written once backward.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse_kernels.off_ids import (
    POWERS,
    OffIds,
    buffers,
    exponentials,
    no_columns,
    power,
    read,
    scale_,
    write_gradient,
)
from fuse_kernels.rows import (
    OVERWRITTEN,
    ActiveRows,
    LossOptions,
    SparseTarget,
    TokenLosses,
    VocabularyShard,
    sparse_target,
)
from fuse_kernels.softcap import cap_, slope_


def chunked_loss(
    logits: Tensor,
    rows: ActiveRows,
    options: LossOptions,
    shard: VocabularyShard,
    *,
    in_forward: bool,
) -> TokenLosses:
    """The losses [a] each of logits [n, v]. The gradient is written over the logits.

    in_forward: the forward pass writes it, which needs the whole vocabulary on this rank;
    else the backward pass does.
    """
    return TokenLosses(*_ChunkedLoss.apply(logits, rows, options, shard, in_forward))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits, rows: ActiveRows, options: LossOptions, shard: VocabularyShard, in_forward: bool
    ):
        if in_forward:
            losses = chunked_losses_and_gradient_(logits, rows, options, shard)
            ctx.state = None
        else:
            losses, ctx.state = chunked_losses(logits, rows, options, shard)
        ctx.rows, ctx.shard = rows, shard
        ctx.save_for_backward(logits)
        ctx.given_away = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_others):
        nothing = (None,) * 4
        if upstream is None:
            return None, *nothing
        if ctx.given_away:
            raise RuntimeError(OVERWRITTEN)
        ctx.given_away = True
        (logits,) = ctx.saved_tensors
        if ctx.state is None:
            scale_(logits, upstream, ctx.rows, ctx.shard)
        else:
            chunked_gradient_(logits, upstream, ctx.state)
        return logits, *nothing


@dataclass(frozen=True)
class ChunkedState:
    """What the gradient needs from the forward pass, besides the logits."""

    rows: ActiveRows
    entries: "_LocalEntries"
    statistics: "_Statistics"
    options: LossOptions
    shard: VocabularyShard


def chunked_losses(
    logits: Tensor, rows: ActiveRows, options: LossOptions, shard: VocabularyShard
) -> tuple[TokenLosses, ChunkedState]:
    """The losses [a] each of logits [n, v], which stay as they are.

    Under a group: one all-gather of [7, a] fp64.
    """
    target = sparse_target(rows, options.tail)
    entries = _local_entries(logits, rows, target, options, shard)
    off_ids = no_columns(logits, rows)
    # Only the sums are wanted here. `exponentials` adds them to off_ids chunk by chunk.
    for _ in exponentials(logits, rows, entries.row, entries.column, options, shard, off_ids):
        pass
    statistics = _statistics(off_ids, _on_ids(target, entries, options.temperature), target, shard)
    state = ChunkedState(rows, entries, statistics, options, shard)
    return _losses(logits, rows, target, statistics, options.temperature), state


def chunked_losses_and_gradient_(
    logits: Tensor, rows: ActiveRows, options: LossOptions, shard: VocabularyShard
) -> TokenLosses:
    """The losses [a] each of logits [n, v]. Writes the gradient of sum(loss) over the logits.

    Only without a group.
    """
    temperature = options.temperature
    target = sparse_target(rows, options.tail)
    # The entries and the label must be read before the loop writes the gradient over them.
    entries = _local_entries(logits, rows, target, options, shard)
    on_ids = _on_ids(target, entries, temperature)
    w_ce, w_kl = rows.ce_weight, rows.kl_weight / temperature
    weights = torch.stack((w_ce, w_kl * (target.mass.sum(1) + target.tail)))
    of_tail = w_kl * target.tail if options.tail == "bucket" else None
    _clear(logits, rows, shard)
    off_ids = no_columns(logits, rows)
    for start, stop, x, y in exponentials(logits, rows, entries.row, entries.column, options, shard, off_ids):
        # The same factors as in `_write_off_ids`, for the rows of this chunk, whose sums off the ids are
        # known now. A softmax over all columns is exp(z - shift) / exp(lse - shift), and
        #     exp(lse - shift) = (sum off the ids) + exp(log-sum-exp on the ids - shift).
        # r, the softmax off the ids, is exp(z / T - shift) / (sum off the ids). That sum is at least 1, as it
        # contains the largest exponential, unless no column is off the ids: then the factors multiply
        # exponentials of 0.
        part = slice(start, stop)
        sums = off_ids.sums[:, part]
        factors = weights[:, part] / (on_ids[:2, part] - off_ids.shifts[:, part]).exp_().add_(sums)
        if of_tail is not None:
            factors[1].sub_(of_tail[part] / sums[1].clamp(min=1.0))
        write_gradient(logits, rows, start, stop, x, y, factors, options)
    statistics = _statistics(off_ids, on_ids, target, shard)
    _write_special(logits, rows, entries, statistics, w_ce, w_kl, temperature)
    return _losses(logits, rows, target, statistics, temperature)


def chunked_gradient_(logits: Tensor, upstream: Tensor, state: ChunkedState) -> None:
    """Writes the gradient of sum(upstream [a] * loss) over the logits [n, v]."""
    rows, statistics, temperature = state.rows, state.statistics, state.options.temperature
    w_ce = upstream.double() * rows.ce_weight
    w_kl = upstream.double() * rows.kl_weight / temperature
    _clear(logits, rows, state.shard)
    _write_off_ids(logits, rows, statistics, w_ce, w_kl, state.options, state.shard)
    _write_special(logits, rows, state.entries, statistics, w_ce, w_kl, temperature)


def _losses(
    logits: Tensor, rows: ActiveRows, target: SparseTarget, statistics: "_Statistics", temperature: float
) -> TokenLosses:
    """The losses [a] each, from the statistics over all shards. Of the logits only the dtype is used."""
    # ce = lse(z) - z(label). D = sum mass log(mass / q) + tail log(tail / q(off the ids)); with log q_j = z_j
    # / T - lse_t and log q(off the ids) = off_t - lse_t all terms in lse_t add up to total * lse_t.
    ce = (statistics.lse_1 - statistics.label_logit).where(rows.labels >= 0, 0.0)
    mass, left = target.mass, statistics.tail
    kl = mass.xlogy(mass).sum(1) - statistics.product / temperature + statistics.total * statistics.lse_t
    kl = kl + left.xlogy(left) - (left * statistics.off_t).where(left > 0, 0.0)
    # A part without weight may be infinite (a masked logit): 0 * inf would make the sum NaN.
    loss = (rows.ce_weight * ce).where(rows.ce_weight != 0, 0.0)
    loss = loss + (rows.kl_weight * kl).where(rows.kl_weight != 0, 0.0)
    student_mass = (statistics.on_t - statistics.lse_t).exp()
    agreement = ((target.stored > 0) & (statistics.likeliest >= statistics.largest)).double()
    result = torch.promote_types(logits.dtype, torch.float32)
    return TokenLosses(
        *(values.to(result) for values in (loss, ce, kl, target.stored, student_mass, agreement))
    )


def _clear(logits: Tensor, rows: ActiveRows, shard: VocabularyShard) -> None:
    """Writes gradient 0 to skipped rows and padded columns, whatever they hold."""
    if rows.index is not None:
        skipped = torch.ones(rows.count, dtype=torch.bool, device=logits.device)
        skipped[rows.index] = False
        logits[skipped] = 0
    logits[:, shard.columns :] = 0


def _write_off_ids(logits, rows, statistics, w_ce, w_kl, options: LossOptions, shard) -> None:
    """Writes dz / dx (w_ce p + w_kl (total q - tail r)) to all columns, chunk by chunk,
    from the statistics over all shards.

    x are the stored logits, z the capped ones: without a cap the same. p = softmax(z), q = softmax(z / T), r
    = the softmax of z / T over the columns off the ids.
    """
    temperature = options.temperature
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Rounded to the buffers' dtype and back: the factors below and the exponentials use the same shift, so
    # that its rounding error cancels. With x = exp(z / T - shift_t): q = x exp(shift_t - lse_t), r = x
    # exp(shift_t - off_t).
    shift_t = statistics.off_t.where(statistics.off_t != -torch.inf, statistics.lse_t).to(dtype).double()
    # The T-th power of exp(z / T - shift_t) is exp(z - T shift_t). At a large T that could overflow, so that
    # only T up to 4 uses it.
    shift_1 = temperature * shift_t if temperature in POWERS else statistics.lse_1.to(dtype).double()
    teacher = (statistics.tail * (shift_t - statistics.off_t).exp()).where(statistics.tail > 0, 0.0)
    factor_t = w_kl * (statistics.total * (shift_t - statistics.lse_t).exp() - teacher)
    factors = torch.stack((w_ce * (shift_1 - statistics.lse_1).exp(), factor_t))
    shift_1, shift_t = shift_1.to(dtype)[:, None], shift_t.to(dtype)[:, None]
    for start, stop, x, y in buffers(logits, rows, shard):
        read(logits, rows, start, stop, 1 / temperature, out=x, softcap=options.softcap)
        x.sub_(shift_t[start:stop]).exp_()
        if temperature in POWERS[1:]:
            power(x, temperature, out=y)
        elif temperature != 1:
            read(logits, rows, start, stop, 1.0, out=y, softcap=options.softcap)
            y.sub_(shift_1[start:stop]).exp_()
        write_gradient(logits, rows, start, stop, x, y, factors[:, start:stop], options)


# --- the special columns: gathered, fp64
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _LocalEntries:
    """The teacher entries and the labels whose column lies in this shard. Rows ascend."""

    row: Tensor  # [e] among the active rows
    slot: Tensor  # [e]
    column: Tensor  # [e] of the shard
    mass: Tensor  # [e] fp64
    logit: Tensor  # [e] fp64, capped
    slope: Tensor  # [e] fp64, what the cap multiplies the gradient by
    is_label: Tensor  # [e] fp64, 1 if the entry is the row's label, else 0
    label_row: Tensor  # [at most a]
    label_column: Tensor
    label_logit: Tensor  # fp64, capped
    label_slope: Tensor  # fp64


def _local_entries(
    logits: Tensor, rows: ActiveRows, target: SparseTarget, options: LossOptions, shard: VocabularyShard
) -> _LocalEntries:
    row, slot = _in_shard(target.ids, shard).nonzero(as_tuple=True)
    (label_row,) = _in_shard(rows.labels, shard).nonzero(as_tuple=True)
    ids, label_ids = target.ids[row, slot], rows.labels[label_row]
    logit, slope = _capped(logits[_position(rows, row), ids - shard.start], options.softcap)
    label_logit, label_slope = _capped(
        logits[_position(rows, label_row), label_ids - shard.start], options.softcap
    )
    return _LocalEntries(
        row=row,
        slot=slot,
        column=ids - shard.start,
        mass=target.mass[row, slot],
        logit=logit,
        slope=slope,
        is_label=(ids == rows.labels[row]).double(),
        label_row=label_row,
        label_column=label_ids - shard.start,
        label_logit=label_logit,
        label_slope=label_slope,
    )


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """z and dz / dx of some logits x, both fp64; x and 1 without a cap."""
    x = logits.double()
    if softcap is None:
        return x, torch.ones_like(x)
    # z is computed in the dtype of the dense columns: equal logits have equal z on the ids and off them.
    z = cap_(x.to(torch.promote_types(logits.dtype, torch.float32), copy=True), softcap)
    return z.double(), slope_(x, softcap)


def _in_shard(ids: Tensor, shard: VocabularyShard) -> Tensor:
    return (ids >= shard.start) & (ids < shard.start + shard.columns) & (ids >= 0)


def _position(rows: ActiveRows, row: Tensor) -> Tensor:
    """The position among all n rows, from a position among the active rows."""
    return row if rows.index is None else rows.index[row]


def _write_special(logits, rows, entries, statistics, w_ce, w_kl, temperature) -> None:
    """Writes the gradient at the columns of labels and entries, rounded once from fp64.

    Labels come first: if an entry has the label's column, the value of the entry is the right one and
    replaces the label's.
    """
    lse_1, lse_t, off_t = statistics.lse_1, statistics.lse_t, statistics.off_t
    total, tail = statistics.total, statistics.tail

    # A label off the ids: dz / dx times w_ce (p - 1) + w_kl (total q - tail r).
    row, logit = entries.label_row, entries.label_logit
    p = (logit - lse_1[row]).exp()
    q = (logit / temperature - lse_t[row]).exp()
    r = (logit / temperature - off_t[row]).exp().where(tail[row] > 0, 0.0)
    value = w_ce[row] * (p - 1) + w_kl[row] * (total[row] * q - tail[row] * r)
    logits[_position(rows, row), entries.label_column] = (value * entries.label_slope).to(logits.dtype)

    # An entry: dz / dx times w_ce (p - [it is the label]) + w_kl (total q - mass).
    row, logit = entries.row, entries.logit
    p = (logit - lse_1[row]).exp()
    q = (logit / temperature - lse_t[row]).exp()
    value = w_ce[row] * (p - entries.is_label) + w_kl[row] * (total[row] * q - entries.mass)
    logits[_position(rows, row), entries.column] = (value * entries.slope).to(logits.dtype)


# --- per-row statistics: what the shards tell each other
# --------------------------------------------------------------


@dataclass(frozen=True)
class _Statistics:
    """Statistics of each row over all shards, [a] fp64 each. Suffix _1: of the capped logits. Suffix _t: of
    the capped logits / temperature."""

    lse_1: Tensor  # log-sum-exp over all columns
    lse_t: Tensor
    off_t: Tensor  # log-sum-exp over the columns off the ids
    on_t: Tensor  # log-sum-exp over the columns on the ids
    product: Tensor  # sum mass * logit
    label_logit: Tensor  # 0 without a label
    largest: Tensor  # the largest logit
    likeliest: Tensor  # logit of the teacher's likeliest entry
    tail: Tensor  # teacher mass off the ids
    total: Tensor  # all teacher mass


def _on_ids(target: SparseTarget, entries: "_LocalEntries", temperature: float) -> Tensor:
    """The part of the statistics that this shard's entries and label give, [6, a] fp64.

    In this order: log-sum-exp of z; of z / T; the largest z; sum of mass z; the label's z; the z of the
    teacher's likeliest entry (the largest of them, if several entries share that mass). Without entries or
    label they are -inf, the two sums 0.
    """
    # [a, k]; -inf, which adds nothing, if the slot is empty or lies in another shard.
    on_ids = torch.full_like(target.mass, -torch.inf)
    on_ids[entries.row, entries.slot] = entries.logit
    product = (entries.mass * entries.logit).where(entries.mass > 0, 0.0)
    product = torch.zeros_like(target.stored).index_add(0, entries.row, product)
    label_logit = torch.zeros_like(product).index_put((entries.label_row,), entries.label_logit)
    if on_ids.shape[1] == 0:
        nothing = torch.full_like(product, -torch.inf)
        return torch.stack((nothing, nothing, nothing, product, label_logit, nothing))
    is_likeliest = target.mass == target.mass.amax(1, keepdim=True)
    likeliest = on_ids.masked_fill(~is_likeliest, -torch.inf).amax(1)
    sums = on_ids.logsumexp(1), (on_ids / temperature).logsumexp(1)
    return torch.stack((*sums, on_ids.amax(1), product, label_logit, likeliest))


def _statistics(off_ids: OffIds, on_ids: Tensor, target: SparseTarget, shard: VocabularyShard) -> _Statistics:
    """The statistics over all shards, from the sums of this shard off and on the ids. Under a group: one
    all-gather of [7, a]."""
    off_1, off_t = off_ids.shifts + off_ids.sums.double().log()
    largest = torch.maximum(off_ids.shifts[0].double(), on_ids[2])
    partial = torch.stack((torch.logaddexp(off_1, on_ids[0]), off_t, on_ids[1], largest, *on_ids[3:]))
    gathered = partial[None]
    if shard.group is not None and partial.numel() > 0:
        all_shards = partial.new_empty((dist.get_world_size(shard.group) * len(partial), partial.shape[1]))
        dist.all_gather_into_tensor(all_shards, partial, group=shard.group)
        gathered = all_shards.view(-1, *partial.shape)
    # The label and each entry lie in one shard: the others give -inf to the maxima and 0 to the sums.
    lse_1, off_t, on_t = gathered[:, :3].logsumexp(0)
    largest, likeliest = gathered[:, (3, 6)].amax(0)
    product, label_logit = gathered[:, 4:6].sum(0)
    # If no column is off the ids, rounding may still leave a small tail mass, which no column can take.
    tail = target.tail.where(off_t != -torch.inf, 0.0)
    total = target.mass.sum(1) + tail
    lse_t = torch.logaddexp(off_t, on_t)
    return _Statistics(lse_1, lse_t, off_t, on_t, product, label_logit, largest, likeliest, tail, total)
