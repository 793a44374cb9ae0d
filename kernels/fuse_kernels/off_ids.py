"""The dense part of the loss in plain torch: exponentials of all columns off the ids, a few rows at a time.

The exponentials are exp(z / T - shift). Any shift near the row's largest z / T is right. The shift is first
rounded to the dtype of the buffers. The fp64 arithmetic around the exponentials uses the same rounded value,
so that its rounding error cancels. z are the logits, or the capped logits if there is a softcap.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_kernels.rows import ActiveRows, LossOptions, VocabularyShard
from fuse_kernels.softcap import cap_, slope_

# Elements of a scratch buffer. On a CPU per thread: two buffers of 512 KB in fp32 stay in a core's own cache.
# On a GPU as many as keep the device busy.
_CPU_CHUNK, _GPU_CHUNK = 1 << 17, 1 << 26
# Temperatures at which exp(z) is a power of exp(z / T) that is cheaper than a second exponential.
POWERS = (1, 2, 4)


@dataclass(frozen=True)
class OffIds:
    """Sums over the columns off the ids, for the rows whose chunks are read so far.

    [2, a] each, in the dtype of the buffers: [0] of z, [1] of z / T.
    """

    shifts: Tensor  # the largest value; for z / T rounded to the dtype
    sums: Tensor  # sum of exp(value - shift)


def no_columns(logits: Tensor, rows: ActiveRows) -> OffIds:
    """The sums over no columns: log-sum-exps of -inf."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    sums = torch.zeros((2, rows.labels.numel()), dtype=dtype, device=logits.device)
    return OffIds(torch.full_like(sums, -torch.inf), sums)


def exponentials(
    logits: Tensor,
    rows: ActiveRows,
    entry_rows: Tensor,
    entry_columns: Tensor,
    options: LossOptions,
    shard: VocabularyShard,
    off_ids: OffIds,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yields start, stop, x = exp(z / T - shift) and y = exp(z - shift) of each chunk of active rows,
    with 0 on the ids. At T = 1 they are equal: then x alone is filled.

    When a chunk is yielded, `off_ids` already holds its shifts and sums. The exponentials are [stop - start,
    columns]. The next chunk reuses their memory. entry_rows (ascending), entry_columns [e]: the places of the
    entries that lie in this shard.
    """
    temperature = options.temperature
    # entry_rows ascends: the entries of the rows start ... stop - 1 are those from first_entry[start] to
    # first_entry[stop].
    first_entry = torch.searchsorted(
        entry_rows, torch.arange(rows.labels.numel() + 1, device=logits.device)
    ).tolist()
    lowest = torch.finfo(off_ids.shifts.dtype).min  # replaces a shift of -inf, as (-inf) - (-inf) is NaN
    for start, stop, x, y in buffers(logits, rows, shard):
        in_chunk = slice(first_entry[start], first_entry[stop])
        on_ids = entry_rows[in_chunk] - start, entry_columns[in_chunk]
        shift_1, shift_t = off_ids.shifts[:, start:stop]
        sum_1, sum_t = off_ids.sums[:, start:stop]

        def take(scale: float, out: Tensor, shift: Tensor, start=start, stop=stop, on_ids=on_ids) -> None:
            read(logits, rows, start, stop, scale, out=out, softcap=options.softcap)
            out[on_ids] = -torch.inf
            torch.amax(out, 1, out=shift)
            out.sub_(shift.clamp_(min=lowest)[:, None]).exp_()

        take(1 / temperature, x, shift_t)
        torch.sum(x, 1, out=sum_t)
        if temperature == 1:
            shift_1.copy_(shift_t)
            sum_1.copy_(sum_t)
            yield start, stop, x, y
            continue
        # exp(z / T - shift)^T = exp(z - T shift): a power serves if T is 2 or 4. At any other T the logits
        # are read again.
        if temperature in POWERS:
            torch.mul(shift_t, temperature, out=shift_1)
            power(x, temperature, out=y)
        else:
            take(1.0, y, shift_1)
        torch.sum(y, 1, out=sum_1)
        yield start, stop, x, y


def power(x: Tensor, temperature: float, out: Tensor) -> None:
    """out = x to the power of the temperature, 2 or 4."""
    torch.mul(x, x, out=out)
    if temperature == 4:
        out.mul_(out)


def write_gradient(
    logits: Tensor,
    rows: ActiveRows,
    start: int,
    stop: int,
    x: Tensor,
    y: Tensor,
    factors: Tensor,
    options: LossOptions,
) -> None:
    """Writes the gradient of every column as if it were off the ids and not the label:
    factors[0] y + factors[1] x, times the slope of the softcap.

    x, y: of `exponentials`, which this overwrites. factors [2, stop - start] fp64. The columns of entries and
    label get wrong values here; the caller rewrites them afterwards.
    """
    of_y, of_x = factors.to(x.dtype)[:, :, None]
    in_place = rows.index is None and logits.dtype == x.dtype
    gradient = logits[start:stop, : x.shape[1]] if in_place else x
    of_z = gradient if options.softcap is None else x
    if options.temperature == 1:
        torch.mul(x, of_x.add_(of_y), out=of_z)
    else:
        torch.addcmul(y.mul_(of_y), x, of_x, out=of_z)
    if options.softcap is not None:
        read(logits, rows, start, stop, 1.0, out=y)
        torch.mul(of_z, slope_(y, options.softcap), out=gradient)
    if not in_place:
        write_back(x, logits, rows, start, stop)


def buffers(
    logits: Tensor, rows: ActiveRows, shard: VocabularyShard
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yields start, stop among the active rows, and two scratch buffers [stop - start, columns], the same
    memory every time."""
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


def read(
    logits: Tensor,
    rows: ActiveRows,
    start: int,
    stop: int,
    scale: float,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    """out = scale times the logits, capped if there is a softcap, of the active rows start ... stop - 1, in
    the dtype of `out`."""
    part = logits[start:stop] if rows.index is None else logits[rows.index[start:stop]]
    part = part[:, : out.shape[1]]
    if softcap is not None:
        cap_(out.copy_(part), softcap).mul_(scale)
    elif part.dtype == out.dtype:
        torch.mul(part, scale, out=out)
    else:  # converted first: a product in a half type would be rounded to that type
        out.copy_(part).mul_(scale)


def write_back(x: Tensor, logits: Tensor, rows: ActiveRows, start: int, stop: int) -> None:
    """Writes x over the logits of the active rows start ... stop - 1."""
    place = slice(start, stop) if rows.index is None else rows.index[start:stop]
    logits[place, : x.shape[1]] = x.to(logits.dtype)


def scale_(gradient: Tensor, upstream: Tensor, rows: ActiveRows, shard: VocabularyShard) -> None:
    """Multiplies the active rows of the gradient [n, v] by upstream [a]."""
    if (upstream == 1).all():
        return
    for start, stop, x, _ in buffers(gradient, rows, shard):
        read(gradient, rows, start, stop, 1.0, out=x)
        x.mul_(upstream[start:stop, None])
        write_back(x, gradient, rows, start, stop)
