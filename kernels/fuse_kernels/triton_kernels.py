"""The Triton kernels of the loss. `triton_loss.py` launches them.

A column that holds a teacher entry is "on the ids", every other column is "off the ids". The residual mass
(tail) of the student is never computed as 1 - (mass on the ids): that difference cancels if the student is
nearly certain. Instead:

1. gather_kernel takes the logits on the ids out of the row and leaves -inf in their places.
2. off_ids_kernel or whole_row_kernel sums over what is left of the row.
3. finish_kernel puts the logits back, or special_gradient_kernel writes their gradient.

This is exact: a bf16 or fp16 number survives the conversion to fp32 and back. Between kernels it relies on
the order of launches only. Within whole_row_kernel it relies on two facts: a value cannot be stored before it
is computed, and the gradient is computed from all logits of its row.

Bytes moved for logits [n, v] in their own dtype: whole_row_kernel reads a row, reads it again while the row
is in the cache, and writes it. If the forward pass cannot see the whole row, off_ids_kernel reads it in the
forward pass, and gradient_kernel reads and writes it in the backward pass. All else is O(n k).

Legend: n rows, v columns of this shard, k slots for entries. x are the logits that are stored, z the capped
logits (the same if CAP is None; see triton_softcap.py), p = softmax(z), q = softmax(z
/ T), r = the softmax of z / T over the columns off the ids alone. The suffix _1 belongs to z, the suffix _t
to z / T. Arrays with one number per row are [fields, n], so that neighbours in n are neighbours in memory.
Row offsets are int64: n v passes 2^31 at 16384 x 131072.
"""

import triton
import triton.language as tl

from fuse_kernels.triton_softcap import capped, times_slope

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _powers(d, inv_t, T_MODE: tl.constexpr):
    """(exp(d / T), exp(d)). T_MODE is the temperature if that is 1, 2 or 4: then one exponential serves both.
    Else it is 0."""
    # exp2 is the instruction that a GPU has: exp(x) = 2^(x log2(e)).
    if T_MODE == 0:
        e_t = tl.exp2(d * (inv_t * LOG2E))
        e_1 = tl.exp2(d * LOG2E)
    else:
        e_t = tl.exp2(d * (LOG2E / T_MODE))
        # exp(d) = exp(d / T)^T: one squaring at T = 2, two at T = 4.
        e_1 = e_t
        if T_MODE >= 2:
            e_1 = e_1 * e_1
        if T_MODE == 4:
            e_1 = e_1 * e_1
    return e_t, e_1


@triton.jit
def _finite(x):
    """x, or 0 if x is -inf.

    The result is a shift that can be subtracted from -inf: (-inf) - (-inf) would be NaN.
    """
    return tl.where(x == NOTHING, 0.0, x)


@triton.jit
def _log_add(a, b):
    """log(exp(a) + exp(b)), relative to the larger of the two. -inf if both are -inf."""
    shift = _finite(tl.maximum(a, b))
    return shift + tl.log(tl.exp(a - shift) + tl.exp(b - shift))


@triton.jit
def _store(pointer, value, mask, ROUND: tl.constexpr):
    """Stores fp32 values in the pointer's dtype, rounded to nearest even.

    ROUND: round to bf16 in this code, because the interpreter only cuts the digits off.
    """
    if ROUND and pointer.dtype.element_ty == tl.bfloat16:
        # bf16 is the upper half of fp32. Adding 0x7FFF rounds the lower half up if it is more than one half;
        # the last bit that stays, added to that, breaks a tie to the even number.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointer, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    LOGITS,  # [n, v], stride `stride`; the kernel leaves -inf at COLUMNS
    LABELS,  # [n] int64 global ids, -100 = none
    IDS,  # [n, k] int64 global ids, -1 = empty
    LOGPROBS,  # [n, k] natural log
    CE_WEIGHT,  # [n]
    KL_WEIGHT,  # [n]
    WEIGHTS,  # [2, n] fp32 out: (CE, KL); 0 for CE without a label, for KL without an entry
    # [4, n] fp32 out: mass on the ids, off them, sum mass log mass; stored mass before renormalisation.
    TEACHER,
    COLUMNS,  # [n, k] int32 out: this shard's column of an entry, -1 = empty, a repeat, or of another shard
    MASS,  # [n, k] fp32 out: the first slot of an id holds the sum of its repeats, 0 elsewhere
    ON_IDS,  # [n, k] fp32 out: the stored logits at COLUMNS, -inf elsewhere
    LABEL_LOGIT,  # [n] fp32 out: the stored logit, 0 if the label lies in another shard
    stride,
    n,
    columns,  # columns of this shard without padding
    start,  # global id of its first column
    k,
    TAIL: tl.constexpr,  # "bucket", "renormalize", "ignore"
    K: tl.constexpr,  # power of two >= k
):
    """One row per program: reads all that the row's k + 1 special columns (entries and label) need,
    and masks the entries."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K)
    ids = tl.load(IDS + row * k + slot, mask=slot < k, other=-1)
    live = ids >= 0
    has_teacher = tl.max(live.to(tl.int32), 0) > 0
    label = tl.load(LABELS + row)
    ce_weight = tl.where(label >= 0, tl.load(CE_WEIGHT + row).to(tl.float32), 0.0)
    kl_weight = tl.where(has_teacher, tl.load(KL_WEIGHT + row).to(tl.float32), 0.0)
    tl.store(WEIGHTS + row, ce_weight)
    tl.store(WEIGHTS + n + row, kl_weight)
    # Nothing else of a row without weight is read, so that NaN there is harmless.
    if (ce_weight == 0.0) & (kl_weight == 0.0):
        return
    # fp64: 1 - m loses its digits in fp32 if the teacher is nearly certain. These are a handful of numbers,
    # so fp64 is cheap. Empty slots may hold NaN: they are masked, not multiplied by 0.
    mass = tl.zeros([K], tl.float64)
    earlier = tl.zeros([K], tl.int32)
    for at in range(0, k, 16):
        # An id may occur several times in a row: it counts once, with the sum of its mass. `same` [K, 16], in
        # registers: row i, column j says whether the entries i and at + j have the same id. `earlier` counts
        # the equal ids in lower slots.
        other = at + tl.arange(0, 16)
        other_ids = tl.load(IDS + row * k + other, mask=other < k, other=-1)
        other_raw = tl.load(LOGPROBS + row * k + other, mask=other_ids >= 0, other=NOTHING)
        other_mass = tl.where(other_ids >= 0, tl.exp(other_raw.to(tl.float64)), 0.0)
        same = (ids[:, None] == other_ids[None, :]) & live[:, None]
        mass += tl.sum(tl.where(same, other_mass[None, :], 0.0), 1)
        earlier += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
    # The first slot of an id keeps the whole mass of that id, its repeats become empty.
    first = live & (earlier == 0)
    mass = tl.where(first, mass, 0.0)
    stored = tl.sum(mass, 0)
    tl.store(TEACHER + 3 * n + row, stored.to(tl.float32))
    # All three tails are one formula with other numbers: the target's mass on the ids, and its residual mass
    # off the ids.
    #   bucket:      p       and 1 - m   (at least 0: half precision may store a sum a little above 1)
    #   renormalize: p / m   and 0
    #   ignore:      p       and 0
    tail = 0.0 * stored
    if TAIL == "renormalize":
        mass = mass / tl.where(stored > 0.0, stored, 1.0)
        stored = tl.where(stored > 0.0, 1.0, 0.0).to(tl.float64)
    elif TAIL == "bucket":
        tail = tl.where(has_teacher, tl.maximum(1.0 - stored, 0.0), 0.0)
    entropy = tl.sum(tl.where(mass > 0.0, mass * tl.log(tl.where(mass > 0.0, mass, 1.0)), 0.0), 0)

    # From here on only the columns of this shard. If the label is one of the entries, its logit is taken from
    # the entries: no second load may read a column that this program is about to overwrite.
    local = ids - start
    here = first & (local >= 0) & (local < columns)
    pointers = LOGITS + row * stride + local
    on_ids = tl.load(pointers, mask=here, other=NOTHING).to(tl.float32)
    column = label - start
    label_here = (label >= 0) & (column >= 0) & (column < columns)
    is_label = here & (local == column)
    among = tl.max(is_label.to(tl.int32), 0) > 0
    elsewhere = tl.load(LOGITS + row * stride + column, mask=label_here & ~among, other=0.0).to(tl.float32)
    label_logit = tl.where(among, tl.sum(tl.where(is_label, on_ids, 0.0), 0), elsewhere)
    tl.store(pointers, tl.full([K], NOTHING, tl.float32).to(LOGITS.dtype.element_ty), mask=here)

    tl.store(TEACHER + row, stored.to(tl.float32))
    tl.store(TEACHER + n + row, tail.to(tl.float32))
    tl.store(TEACHER + 2 * n + row, entropy.to(tl.float32))
    tl.store(COLUMNS + row * k + slot, tl.where(here, local, -1).to(tl.int32), mask=slot < k)
    tl.store(MASS + row * k + slot, mass.to(tl.float32), mask=slot < k)
    tl.store(ON_IDS + row * k + slot, on_ids, mask=slot < k)
    tl.store(LABEL_LOGIT + row, label_logit)


@triton.jit
def _online(x, m, sum_t, sum_1, inv_t, T_MODE: tl.constexpr):
    """Adds one tile [r, c] to each lane's maximum and sums [c].

    The lanes are combined only after the last tile.

    This is the online softmax: sums are relative to the maximum so far. A new maximum m' rescales the earlier
    sums by exp((m - m') / T) and exp(m - m').
    """
    new = tl.maximum(m, tl.max(x, 0))
    shift = _finite(new)
    scale_t, scale_1 = _powers(m - shift, inv_t, T_MODE)
    e_t, e_1 = _powers(x - shift[None, :], inv_t, T_MODE)
    return new, sum_t * scale_t + tl.sum(e_t, 0), sum_1 * scale_1 + tl.sum(e_1, 0)


@triton.jit
def _off_ids_sums(
    logits, first, last, inv_t, R: tl.constexpr, C: tl.constexpr, T_MODE: tl.constexpr, CAP: tl.constexpr
):
    """Maximum m, sum exp((z - m) / T) and sum exp(z - m) over the columns first ... last - 1 of a row."""
    tile = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    m = tl.full([C], NOTHING, tl.float32)
    sum_t = tl.zeros([C], tl.float32)
    sum_1 = tl.zeros([C], tl.float32)
    whole = first + (tl.maximum(last - first, 0) // (R * C)) * (R * C)
    # Whole tiles first, without a mask, so that every load moves 16 bytes;
    # then one masked tile with the rest.
    for at in range(first, whole, R * C):
        z = capped(tl.load(logits + at + tile).to(tl.float32), CAP)
        m, sum_t, sum_1 = _online(z, m, sum_t, sum_1, inv_t, T_MODE)
    if whole < last:
        x = tl.load(logits + whole + tile, mask=whole + tile < last, other=NOTHING).to(tl.float32)
        m, sum_t, sum_1 = _online(capped(x, CAP), m, sum_t, sum_1, inv_t, T_MODE)
    # Each lane has its own maximum: bring all lanes to the largest one before their sums are added.
    top = tl.max(m, 0)
    scale_t, scale_1 = _powers(m - _finite(top), inv_t, T_MODE)
    return top, tl.sum(sum_t * scale_t, 0), tl.sum(sum_1 * scale_1, 0)


@triton.jit
def off_ids_kernel(
    LOGITS,  # [n, v], -inf on the ids
    WEIGHTS,  # [2, n]
    PARTS,  # [splits, 3, n] fp32 out: maximum m, sum exp((z - m) / T), sum exp(z - m)
    stride,
    n,
    columns,
    split_columns,  # columns of one program, a multiple of 16
    inv_t,
    R: tl.constexpr,  # rows of a tile, all held by the same thread: the loads that a thread has in flight
    C: tl.constexpr,  # columns of a tile: 16 bytes for every thread
    T_MODE: tl.constexpr,
    CAP: tl.constexpr,  # of the logits; None: no cap
):
    """One part of a row per program.

    If the forward pass writes no gradient, this is its only read of the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    if (tl.load(WEIGHTS + row) == 0.0) & (tl.load(WEIGHTS + n + row) == 0.0):
        return
    first = (part * split_columns).to(tl.int32)
    last = tl.minimum(first + split_columns, columns)
    top, sum_t, sum_1 = _off_ids_sums(LOGITS + row * stride, first, last, inv_t, R, C, T_MODE, CAP)
    out = PARTS + part * 3 * n + row
    tl.store(out, top)
    tl.store(out + n, sum_t)
    tl.store(out + 2 * n, sum_1)


@triton.jit
def _on_ids_sums(here, mass, on_ids, inv_t):
    """What the slots [k] of a row add up to. on_ids: their logits, -inf if an entry is not in this shard.

    Returns the log-sum-exps of z and of z / T, the largest z, the z of the teacher's likeliest entry (the
    largest of them, if several entries share that mass), and the sum of mass z.
    """
    largest = tl.max(on_ids, 0)
    top = _finite(largest)
    on_1 = top + tl.log(tl.sum(tl.exp(on_ids - top), 0))
    on_t = top * inv_t + tl.log(tl.sum(tl.exp((on_ids - top) * inv_t), 0))
    likeliest = tl.max(tl.where(mass == tl.max(mass, 0), on_ids, NOTHING), 0)
    product = tl.sum(tl.where(here & (mass > 0.0), mass * on_ids, 0.0), 0)
    return on_1, on_t, largest, likeliest, product


@triton.jit
def _losses(
    ce_weight, kl_weight, has_label, lse_1, off_t, on_t, product, label_logit, largest, likeliest, stored,
    tail, entropy,
    teacher_mass, inv_t,
):  # fmt: skip
    """Loss, ce, kl, student mass and agreement of one row or of several;
    then log-sum-exp of z / T, tail and total mass."""
    lse_t = _log_add(off_t, on_t)
    # If no column is off the ids, rounding may still leave a small tail mass, which no column can take.
    tail = tl.where(off_t == NOTHING, 0.0, tail)
    total = stored + tail
    # -log p(label) = lse(z) - z(label)
    ce = tl.where(has_label, lse_1 - label_logit, 0.0)
    # D = sum mass log(mass / q) + tail log(tail / q(off the ids)). With log q_j = z_j / T - lse_t and
    # log q(off the ids) = off_t - lse_t this becomes
    #     sum mass log mass - (sum mass z) / T + (sum mass) lse_t   and   tail (log tail - off_t) + tail lse_t
    # where (sum mass) lse_t + tail lse_t = total lse_t. off_t is a log-sum-exp of its own, so that log q(off
    # the ids) keeps its digits however small that mass is.
    kl = entropy - product * inv_t + total * lse_t
    kl += tl.where(tail > 0.0, tail * (tl.log(tl.where(tail > 0.0, tail, 1.0)) - off_t), 0.0)
    kl = tl.where(total > 0.0, kl, 0.0)
    # A part without weight may be infinite (a masked logit): 0 * inf would make the sum NaN.
    loss = tl.where(ce_weight != 0.0, ce_weight * ce, 0.0) + tl.where(kl_weight != 0.0, kl_weight * kl, 0.0)
    student_mass = tl.where(on_t == NOTHING, 0.0, tl.exp(on_t - lse_t))
    agreement = tl.where((likeliest >= largest) & (teacher_mass > 0.0), 1.0, 0.0)
    return loss, ce, kl, student_mass, agreement, lse_t, tail, total


@triton.jit
def _store_losses(RESULTS, row, n, inside, loss, ce, kl, teacher_mass, student_mass, agreement):
    """Writes RESULTS [6, n] for one row or for several, in the order of TokenLosses."""
    tl.store(RESULTS + row, loss, mask=inside)
    tl.store(RESULTS + n + row, ce, mask=inside)
    tl.store(RESULTS + 2 * n + row, kl, mask=inside)
    tl.store(RESULTS + 3 * n + row, teacher_mass, mask=inside)
    tl.store(RESULTS + 4 * n + row, student_mass, mask=inside)
    tl.store(RESULTS + 5 * n + row, agreement, mask=inside)


@triton.jit
def _store_coefficients(COEFFICIENTS, row, n, inside, lse_1, lse_t, off_t, total, tail):
    """Writes COEFFICIENTS [5, n] for one row or for several."""
    tl.store(COEFFICIENTS + row, lse_1, mask=inside)
    tl.store(COEFFICIENTS + n + row, lse_t, mask=inside)
    tl.store(COEFFICIENTS + 2 * n + row, off_t, mask=inside)
    tl.store(COEFFICIENTS + 3 * n + row, total, mask=inside)
    tl.store(COEFFICIENTS + 4 * n + row, tail, mask=inside)


@triton.jit
def finish_kernel(
    LOGITS,  # [n, v]; the kernel puts the logits on the ids back
    WEIGHTS,  # [2, n]
    PARTS,  # [splits, 3, n]
    COLUMNS,  # [n, k]
    MASS,  # [n, k]
    ON_IDS,  # [n, k]
    LABEL_LOGIT,  # [n]
    LABELS,  # [n]
    TEACHER,  # [4, n]
    STATISTICS,  # [7, n] fp32 out, what the shards exchange; see loss_kernel. None without a group
    RESULTS,  # [6, n] fp32 out, only without a group
    COEFFICIENTS,  # [5, n] fp32 out, only without a group; see loss_kernel
    stride,
    n,
    k,
    splits,
    inv_t,
    K: tl.constexpr,
    CAP: tl.constexpr,
):
    """One row per program: this shard's part of the row's statistics or, without a group,
    the losses themselves."""
    row = tl.program_id(0).to(tl.int64)
    ce_weight = tl.load(WEIGHTS + row)
    kl_weight = tl.load(WEIGHTS + n + row)
    if (ce_weight == 0.0) & (kl_weight == 0.0):
        if STATISTICS is None:
            _store_losses(RESULTS, row, n, True, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    slot = tl.arange(0, K)
    column = tl.load(COLUMNS + row * k + slot, mask=slot < k, other=-1)
    here = column >= 0
    on_ids = tl.load(ON_IDS + row * k + slot, mask=here, other=NOTHING)
    mass = tl.load(MASS + row * k + slot, mask=slot < k, other=0.0)
    # Converting back is exact: the value came from this dtype.
    tl.store(LOGITS + row * stride + column, on_ids.to(LOGITS.dtype.element_ty), mask=here)
    on_ids = capped(on_ids, CAP)

    # The parts of the row have maxima of their own: first the largest of them, then all sums relative to it.
    # `sum_t` and `sum_1` then give the log-sum-exps off the ids,
    # shift / T + log(sum_t) and shift + log(sum_1).
    m = tl.load(PARTS + row)
    for part in range(1, splits):
        m = tl.maximum(m, tl.load(PARTS + part * 3 * n + row))
    shift = _finite(m)
    sum_t = 0.0
    sum_1 = 0.0
    for part in range(splits):
        d = tl.load(PARTS + part * 3 * n + row) - shift
        sum_t += tl.load(PARTS + (part * 3 + 1) * n + row) * tl.exp(d * inv_t)
        sum_1 += tl.load(PARTS + (part * 3 + 2) * n + row) * tl.exp(d)
    off_t = shift * inv_t + tl.log(sum_t)
    off_1 = shift + tl.log(sum_1)

    on_1, on_t, on_largest, likeliest, product = _on_ids_sums(here, mass, on_ids, inv_t)
    lse_1 = _log_add(off_1, on_1)
    largest = tl.maximum(m, on_largest)
    label_logit = capped(tl.load(LABEL_LOGIT + row), CAP)
    if STATISTICS is None:
        has_label = tl.load(LABELS + row) >= 0
        teacher_mass = tl.load(TEACHER + 3 * n + row)
        loss, ce, kl, student_mass, agreement, lse_t, tail, total = _losses(
            ce_weight, kl_weight, has_label, lse_1, off_t, on_t, product, label_logit, largest, likeliest,
            tl.load(TEACHER + row), tl.load(TEACHER + n + row), tl.load(TEACHER + 2 * n + row), teacher_mass,
            inv_t,
        )  # fmt: skip
        _store_losses(RESULTS, row, n, True, loss, ce, kl, teacher_mass, student_mass, agreement)
        _store_coefficients(COEFFICIENTS, row, n, True, lse_1, lse_t, off_t, total, tail)
    else:
        tl.store(STATISTICS + row, lse_1)
        tl.store(STATISTICS + n + row, off_t)
        tl.store(STATISTICS + 2 * n + row, on_t)
        tl.store(STATISTICS + 3 * n + row, product)
        tl.store(STATISTICS + 4 * n + row, label_logit)
        tl.store(STATISTICS + 5 * n + row, largest)
        tl.store(STATISTICS + 6 * n + row, likeliest)


@triton.jit
def loss_kernel(
    # STATISTICS [shards, 7, n]: log-sum-exp of z; of z / T off the ids; of z / T on the ids; sum mass z on
    # the ids; the label's z; the largest z; the z of the teacher's likeliest entry.
    STATISTICS,
    TEACHER,  # [4, n]
    WEIGHTS,  # [2, n]
    LABELS,  # [n]
    RESULTS,  # [6, n] fp32 out
    # COEFFICIENTS [5, n] fp32 out: log-sum-exp of z; of z / T; of z / T off the ids; total mass of the
    # teacher; its mass off the ids.
    COEFFICIENTS,
    n,
    shards,
    inv_t,
    B: tl.constexpr,
):
    """B rows per program: computes the losses, and what their gradient needs,
    from the statistics of all shards."""
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < n
    ce_weight = tl.load(WEIGHTS + row, mask=inside, other=0.0)
    kl_weight = tl.load(WEIGHTS + n + row, mask=inside, other=0.0)
    active = (ce_weight != 0.0) | (kl_weight != 0.0)
    # A shard of the vocabulary and a part of a row combine in the same way: log-sum-exps by _log_add, maxima
    # by the maximum, sums by the sum.
    # The label and each entry lie in exactly one shard, the others give 0 or -inf.
    lse_1 = tl.full([B], NOTHING, tl.float32)
    off_t = lse_1
    on_t = lse_1
    largest = lse_1
    likeliest = lse_1
    product = tl.zeros([B], tl.float32)
    label_logit = product
    for shard in range(shards):
        at = STATISTICS + shard * 7 * n + row
        lse_1 = _log_add(lse_1, tl.load(at, mask=active, other=0.0))
        off_t = _log_add(off_t, tl.load(at + n, mask=active, other=0.0))
        on_t = _log_add(on_t, tl.load(at + 2 * n, mask=active, other=0.0))
        product += tl.load(at + 3 * n, mask=active, other=0.0)
        label_logit += tl.load(at + 4 * n, mask=active, other=0.0)
        largest = tl.maximum(largest, tl.load(at + 5 * n, mask=active, other=0.0))
        likeliest = tl.maximum(likeliest, tl.load(at + 6 * n, mask=active, other=0.0))
    has_label = tl.load(LABELS + row, mask=active, other=-100) >= 0
    stored = tl.load(TEACHER + row, mask=active, other=0.0)
    tail = tl.load(TEACHER + n + row, mask=active, other=0.0)
    entropy = tl.load(TEACHER + 2 * n + row, mask=active, other=0.0)
    teacher_mass = tl.load(TEACHER + 3 * n + row, mask=active, other=0.0)
    loss, ce, kl, student_mass, agreement, lse_t, tail, total = _losses(
        ce_weight, kl_weight, has_label, lse_1, off_t, on_t, product, label_logit, largest, likeliest,
        stored, tail, entropy, teacher_mass, inv_t,
    )  # fmt: skip
    student_mass = tl.where(active, student_mass, 0.0)
    _store_losses(RESULTS, row, n, inside, loss, ce, kl, teacher_mass, student_mass, agreement)
    _store_coefficients(COEFFICIENTS, row, n, active, lse_1, lse_t, off_t, total, tail)


@triton.jit
def _factors(w_ce, w_kl, lse_1, lse_t, off_t, total, tail, T_MODE: tl.constexpr):
    """shift, factor_t and factor_1, which `_off_ids_gradient` takes.

    They are the same for all columns of a row.

    w_ce, w_kl: the weights times the upstream gradient;
    w_kl also contains the 1 / T that the gradient of z / T carries.

    For a column j that is off the ids and not the label

        dloss / dz_j = w_ce p_j + w_kl (total q_j - tail r_j)

    Let u_j = exp(z_j / T - shift), with shift = off_t, the log-sum-exp of z / T off the ids. Then

        q_j = exp(z_j / T - lse_t) = u_j exp(shift - lse_t)
        r_j = exp(z_j / T - off_t) = u_j
        p_j = exp(z_j - lse_1)     = u_j^T exp(T shift - lse_1)

    so that dloss / dz_j = u_j factor_t + u_j^T factor_1, with one exponential per column.
    """
    # If no column is off the ids, off_t is -inf. Then tail is 0, and any finite shift is right: lse_t is one.
    shift = tl.where(off_t == NOTHING, lse_t, off_t)
    # total q_j - tail r_j = u_j (total exp(shift - lse_t) - tail): off the ids the student's distribution is
    # scaled, its shape stays. The factor is 0 if the student's tail mass exp(off_t - lse_t) is tail / total.
    factor_t = w_kl * (total * tl.exp(shift - lse_t) - tail)
    factor_1 = w_ce
    # At T = 1, 2 and 4 p_j is a power of u_j. At any other T (T_MODE 0) p_j takes an exponential of its own
    # and no factor.
    if T_MODE != 0:
        factor_1 = factor_1 * tl.exp(T_MODE * shift - lse_1)
    return shift, factor_t, factor_1


@triton.jit
def _write_gradient(
    logits, first, real, last, shift, factor_t, factor_1, lse_1, inv_t,
    BLOCK: tl.constexpr, T_MODE: tl.constexpr, ROUND: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Writes the gradient over the columns first ... last - 1 of a row. The columns from `real` on are
    padding and get 0.

    The order is from the end to the start:
    the forward loop has read the end last, so that it is still in the nearest cache.
    """
    block = tl.arange(0, BLOCK)
    tiles = tl.maximum(real - first, 0) // BLOCK
    whole = first + tiles * BLOCK
    # First the masked rest behind the whole tiles, together with the padding.
    for at in range(whole, last, BLOCK):
        x = tl.load(logits + at + block, mask=at + block < real, other=NOTHING).to(tl.float32)
        value = _off_ids_gradient(x, factor_t, factor_1, shift, lse_1, inv_t, T_MODE, CAP)
        _store(logits + at + block, tl.where(at + block < real, value, 0.0), at + block < last, ROUND)
    # Then the whole tiles, without a mask, so that every load and store moves 16 bytes.
    for tile in range(tiles):
        at = first + (tiles - 1 - tile) * BLOCK
        x = tl.load(logits + at + block).to(tl.float32)
        value = _off_ids_gradient(x, factor_t, factor_1, shift, lse_1, inv_t, T_MODE, CAP)
        _store(logits + at + block, value, None, ROUND)


@triton.jit
def _write_zeros(logits, first, last, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """Writes 0 over the columns first ... last - 1 of a row without weight. The row is not read, so that NaN
    there is harmless."""
    block = tl.arange(0, BLOCK)
    for at in range(first, last, BLOCK):
        _store(logits + at + block, tl.zeros([BLOCK], tl.float32), at + block < last, ROUND)


@triton.jit
def whole_row_kernel(
    LOGITS,  # [n, v], -inf on the ids; becomes the gradient of sum(loss), except in the special columns
    LABELS,  # [n]
    WEIGHTS,  # [2, n]
    TEACHER,  # [4, n]
    COLUMNS,  # [n, k]
    MASS,  # [n, k]
    ON_IDS,  # [n, k]
    LABEL_LOGIT,  # [n]
    RESULTS,  # [6, n] fp32 out
    COEFFICIENTS,  # [5, n] fp32 out; see loss_kernel
    stride,
    n,
    columns,
    width,  # v: columns ... width - 1 are padding, whose gradient is 0
    k,
    inv_t,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    T_MODE: tl.constexpr,
    ROUND: tl.constexpr,
    CAP: tl.constexpr,
):
    """One row per program, without a group:
    computes the losses, then writes the gradient while the row is in the cache."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    ce_weight = tl.load(WEIGHTS + row)
    kl_weight = tl.load(WEIGHTS + n + row)
    if (ce_weight == 0.0) & (kl_weight == 0.0):
        _write_zeros(logits, 0, width, BLOCK, ROUND)
        _store_losses(RESULTS, row, n, True, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    # First reading of the row: its sums off the ids.
    m, sum_t, sum_1 = _off_ids_sums(logits, 0, columns, inv_t, R, C, T_MODE, CAP)
    shift = _finite(m)
    off_t = shift * inv_t + tl.log(sum_t)
    off_1 = shift + tl.log(sum_1)

    # The entries come from gather_kernel's buffers, as the row holds -inf at their columns.
    slot = tl.arange(0, K)
    here = tl.load(COLUMNS + row * k + slot, mask=slot < k, other=-1) >= 0
    on_ids = capped(tl.load(ON_IDS + row * k + slot, mask=here, other=NOTHING), CAP)
    mass = tl.load(MASS + row * k + slot, mask=slot < k, other=0.0)
    on_1, on_t, on_largest, likeliest, product = _on_ids_sums(here, mass, on_ids, inv_t)
    lse_1 = _log_add(off_1, on_1)
    has_label = tl.load(LABELS + row) >= 0
    teacher_mass = tl.load(TEACHER + 3 * n + row)
    loss, ce, kl, student_mass, agreement, lse_t, tail, total = _losses(
        ce_weight, kl_weight, has_label, lse_1, off_t, on_t, product,
        capped(tl.load(LABEL_LOGIT + row), CAP),
        tl.maximum(m, on_largest), likeliest,
        tl.load(TEACHER + row), tl.load(TEACHER + n + row), tl.load(TEACHER + 2 * n + row), teacher_mass,
        inv_t,
    )  # fmt: skip
    _store_losses(RESULTS, row, n, True, loss, ce, kl, teacher_mass, student_mass, agreement)
    _store_coefficients(COEFFICIENTS, row, n, True, lse_1, lse_t, off_t, total, tail)

    # Second reading, from the cache. exp(-inf) = 0 at the masked columns;
    # special_gradient_kernel rewrites them afterwards.
    shift, factor_t, factor_1 = _factors(
        ce_weight, kl_weight * inv_t, lse_1, lse_t, off_t, total, tail, T_MODE
    )
    _write_gradient(
        logits, 0, columns, width, shift, factor_t, factor_1, lse_1, inv_t, BLOCK, T_MODE, ROUND, CAP
    )


@triton.jit
def gradient_kernel(
    LOGITS,  # [n, v]; becomes the gradient
    UPSTREAM,  # [n] fp32, None: 1
    WEIGHTS,  # [2, n]
    COEFFICIENTS,  # [5, n]
    stride,
    n,
    columns,
    width,  # v: columns ... width - 1 are padding, whose gradient is 0
    split_columns,
    inv_t,
    BLOCK: tl.constexpr,
    T_MODE: tl.constexpr,
    ROUND: tl.constexpr,
    CAP: tl.constexpr,
):
    """One part of a row per program: the gradient of every column as if it were off the ids and not the
    label.

    The columns of entries and label get a wrong value here; special_gradient_kernel rewrites them afterwards.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    first = (tl.program_id(1).to(tl.int64) * split_columns).to(tl.int32)
    last = tl.minimum(first + split_columns, width)
    real = tl.minimum(last, columns)
    ce_weight = tl.load(WEIGHTS + row)
    kl_weight = tl.load(WEIGHTS + n + row)
    if (ce_weight == 0.0) & (kl_weight == 0.0):
        _write_zeros(logits, first, last, BLOCK, ROUND)
        return
    lse_1 = tl.load(COEFFICIENTS + row)
    lse_t = tl.load(COEFFICIENTS + n + row)
    off_t = tl.load(COEFFICIENTS + 2 * n + row)
    total = tl.load(COEFFICIENTS + 3 * n + row)
    tail = tl.load(COEFFICIENTS + 4 * n + row)
    w_ce = ce_weight
    w_kl = kl_weight * inv_t
    if UPSTREAM is not None:
        upstream = tl.load(UPSTREAM + row)
        w_ce = upstream * w_ce
        w_kl = upstream * w_kl
    shift, factor_t, factor_1 = _factors(w_ce, w_kl, lse_1, lse_t, off_t, total, tail, T_MODE)
    _write_gradient(
        logits, first, real, last, shift, factor_t, factor_1, lse_1, inv_t, BLOCK, T_MODE, ROUND, CAP
    )


@triton.jit
def _off_ids_gradient(x, factor_t, factor_1, shift, lse_1, inv_t, T_MODE: tl.constexpr, CAP: tl.constexpr):
    """dloss / dx of logits x that are off the ids and not the label:
    dz / dx times u factor_t + u^T factor_1. See `_factors`."""
    z = capped(x, CAP)
    if T_MODE == 0:
        value = factor_t * tl.exp2((z * inv_t - shift) * LOG2E) + factor_1 * tl.exp2((z - lse_1) * LOG2E)
    else:
        u = tl.exp2((z * (1.0 / T_MODE) - shift) * LOG2E)
        # value = u (factor_t + u^(T - 1) factor_1): `power` is the second summand.
        power = factor_1
        if T_MODE >= 2:
            power = power * u
        if T_MODE == 4:
            power = power * u * u
        value = u * (factor_t + power)
    return times_slope(value, x, CAP)


@triton.jit
def special_gradient_kernel(
    LOGITS,  # [n, v]: already the gradient off the ids
    UPSTREAM,  # [n] fp32, None: 1
    WEIGHTS,  # [2, n]
    COEFFICIENTS,  # [5, n]
    LABELS,  # [n]
    LABEL_LOGIT,  # [n]
    COLUMNS,  # [n, k]
    MASS,  # [n, k]
    ON_IDS,  # [n, k]
    stride,
    n,
    columns,
    start,
    k,
    inv_t,
    K: tl.constexpr,
    ROUND: tl.constexpr,
    CAP: tl.constexpr,
):
    """One row per program: writes the gradient of entries and label, rounded once from fp32."""
    row = tl.program_id(0).to(tl.int64)
    ce_weight = tl.load(WEIGHTS + row)
    kl_weight = tl.load(WEIGHTS + n + row)
    if (ce_weight == 0.0) & (kl_weight == 0.0):
        return
    w_ce = ce_weight
    w_kl = kl_weight * inv_t
    if UPSTREAM is not None:
        upstream = tl.load(UPSTREAM + row)
        w_ce = upstream * w_ce
        w_kl = upstream * w_kl
    lse_1 = tl.load(COEFFICIENTS + row)
    lse_t = tl.load(COEFFICIENTS + n + row)
    off_t = tl.load(COEFFICIENTS + 2 * n + row)
    total = tl.load(COEFFICIENTS + 3 * n + row)
    tail = tl.load(COEFFICIENTS + 4 * n + row)

    slot = tl.arange(0, K)
    column = tl.load(COLUMNS + row * k + slot, mask=slot < k, other=-1)
    here = column >= 0
    mass = tl.load(MASS + row * k + slot, mask=here, other=0.0)
    x = tl.load(ON_IDS + row * k + slot, mask=here, other=NOTHING)
    z = capped(x, CAP)
    label = tl.load(LABELS + row) - start
    is_label = here & (column == label)
    # On the ids: dloss / dz_j = w_ce (p_j - [j is the label]) + w_kl (total q_j - mass_j).
    value = w_ce * (tl.exp(z - lse_1) - is_label.to(tl.float32)) + w_kl * (
        total * tl.exp(z * inv_t - lse_t) - mass
    )
    _store(LOGITS + row * stride + column, times_slope(value, x, CAP), here, ROUND)

    # A label that is no entry is off the ids: dloss / dz_j = w_ce (p_j - 1) + w_kl (total q_j - tail r_j).
    # `alone`: the label lies in this shard and is none of the entries, whose store this would overwrite.
    x = tl.load(LABEL_LOGIT + row)
    z = capped(x, CAP)
    r = tl.where(tail > 0.0, tl.exp(z * inv_t - off_t), 0.0)
    value = w_ce * (tl.exp(z - lse_1) - 1.0) + w_kl * (total * tl.exp(z * inv_t - lse_t) - tail * r)
    alone = (label >= 0) & (label < columns) & (tl.max(is_label.to(tl.int32), 0) == 0)
    _store(LOGITS + row * stride + label, times_slope(value, x, CAP), alone, ROUND)


@triton.jit
def scale_kernel(
    GRADIENT,  # [n, v]
    UPSTREAM,  # [n] fp32
    WEIGHTS,  # [2, n]
    stride,
    n,
    width,
    split_columns,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One part of a row per program: multiplies the gradient by the row's upstream gradient, if that is not
    1."""
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(UPSTREAM + row)
    weightless = (tl.load(WEIGHTS + row) == 0.0) & (tl.load(WEIGHTS + n + row) == 0.0)
    if (upstream == 1.0) | weightless:
        return
    gradient = GRADIENT + row * stride
    first = (tl.program_id(1).to(tl.int64) * split_columns).to(tl.int32)
    last = tl.minimum(first + split_columns, width)
    block = tl.arange(0, BLOCK)
    whole = first + (tl.maximum(last - first, 0) // BLOCK) * BLOCK
    # Whole tiles without a mask, so that every load and store moves 16 bytes;
    # then one masked tile with the rest.
    for at in range(first, whole, BLOCK):
        x = tl.load(gradient + at + block).to(tl.float32)
        _store(gradient + at + block, x * upstream, None, ROUND)
    if whole < last:
        inside = whole + block < last
        x = tl.load(gradient + whole + block, mask=inside, other=0.0).to(tl.float32)
        _store(gradient + whole + block, x * upstream, inside, ROUND)
