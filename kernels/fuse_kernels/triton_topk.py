"""topk_logsumexp on a GPU: one kernel, one pass over the logits.

The columns of a row are dealt out to lanes, 16 bytes at a time. During the pass a lane keeps no list: it
keeps its largest logit and the number of the tile in which that logit came first. The k largest logits of a
row lie in the k lanes whose largest logits rank first. A second reading of those lanes, about a thousand
columns, finds the k largest.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuse_kernels.rows import VocabularyShard
from fuse_kernels.topk import TopK
from fuse_kernels.triton_kernels import NOTHING, _finite, _online, _powers
from fuse_kernels.triton_loss import POWERS, interpreted, on_its_device, slots_of
from fuse_kernels.triton_softcap import capped

_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _rank_key(value, number):
    """int64 that orders as (value, then the lower number first); see `_rank_keys` in topk.py."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - number).to(tl.int64)


@triton.jit
def topk_kernel(
    LOGITS,  # [n, v]
    LABELS,  # [n] int64 global ids; None: no label logits
    IDS,  # [n, k] int64 out, global
    LARGEST,  # [n, k] fp32 out
    LSE,  # [2, n] fp32 out: at T, at 1; relative to the largest
    LABEL_LOGIT,  # [n] fp32 out
    stride,
    n,
    columns,  # real ones of this shard
    start,  # global id of its first column
    k,
    inv_t,
    K: tl.constexpr,  # power of two >= k
    C: tl.constexpr,  # lanes, at least K
    R: tl.constexpr,  # neighbouring columns that a lane takes from a tile: 16 bytes
    S: tl.constexpr,  # power of two >= tiles of a row
    T_MODE: tl.constexpr,
    CAP: tl.constexpr,  # of the logits; None: no cap
):
    """One row per program: the k largest logits and the two log-sum-exps, in one pass over the row."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    lane = tl.arange(0, C)
    tile = lane[:, None] * R + tl.arange(0, R)[None, :]
    m = tl.full([C], NOTHING, tl.float32)
    first_tile = tl.zeros([C], tl.int32)  # the tile in which m came first
    sum_t = tl.zeros([C], tl.float32)
    sum_1 = tl.zeros([C], tl.float32)
    whole_tiles = columns // (C * R)
    # Whole tiles without a mask, so that every load moves 16 bytes; then one masked tile with the rest.
    for number in range(whole_tiles):
        z = capped(tl.trans(tl.load(logits + number * (C * R) + tile).to(tl.float32)), CAP)
        first_tile = tl.where(tl.max(z, 0) > m, number, first_tile)
        m, sum_t, sum_1 = _online(z, m, sum_t, sum_1, inv_t, T_MODE)
    at = whole_tiles * (C * R)
    if at < columns:
        x = tl.trans(tl.load(logits + at + tile, mask=at + tile < columns, other=NOTHING).to(tl.float32))
        z = capped(x, CAP)
        first_tile = tl.where(tl.max(z, 0) > m, whole_tiles, first_tile)
        m, sum_t, sum_1 = _online(z, m, sum_t, sum_1, inv_t, T_MODE)
    scale_t, scale_1 = _powers(m - _finite(tl.max(m, 0)), inv_t, T_MODE)
    tl.store(LSE + row, tl.log(tl.sum(sum_t * scale_t, 0)))
    tl.store(LSE + n + row, tl.log(tl.sum(sum_1 * scale_1, 0)))

    # Pick the k best lanes, one per turn. Of two lanes with equal largest logits, the one with the lower
    # (tile, lane) has the lower column, so that equal logits rank by id. A lane without a column ranks last.
    slot = tl.arange(0, K)
    keys = tl.where(lane * R < columns, _rank_key(m, first_tile * C + lane), _LOWEST)
    lanes = tl.zeros([K], tl.int32)
    for i in range(k):
        best = tl.max(keys, 0)
        lanes = tl.where(slot == i, tl.max(tl.where(keys == best, lane, 0), 0), lanes)
        keys = tl.where(keys == best, _LOWEST, keys)

    # Read all columns of those k lanes again, z [K, S * R]: element `part` of a lane is column part % R of
    # its piece of tile part // R.
    # Then pick the k best columns, one per turn; a key holds both the logit and the column.
    part = tl.arange(0, S * R)
    column = (part // R * (C * R) + part % R)[None, :] + (lanes * R)[:, None]
    inside = (column < columns) & (slot < k)[:, None] & (slot * R < columns)[:, None]
    z = capped(tl.load(logits + column, mask=inside, other=NOTHING).to(tl.float32), CAP)
    keys = tl.where(inside, _rank_key(z, column), _LOWEST)
    best_keys = tl.full([K], _LOWEST, tl.int64)
    for i in range(k):
        best = tl.max(tl.max(keys, 1), 0)
        best_keys = tl.where(slot == i, best, best_keys)
        keys = tl.where(keys == best, _LOWEST, keys)
    # Undo `_rank_key`: the upper half of a key is the logit, the lower half the column.
    is_column = best_keys != _LOWEST
    ordered = (best_keys >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    ids = 0x7FFFFFFF - (best_keys & 0xFFFFFFFF) + start
    tl.store(IDS + row * k + slot, tl.where(is_column, ids, -1), mask=slot < k)
    tl.store(LARGEST + row * k + slot, tl.where(is_column, value, NOTHING), mask=slot < k)
    if LABELS is not None:
        label = tl.load(LABELS + row) - start
        here = (label >= 0) & (label < columns)
        tl.store(LABEL_LOGIT + row, capped(tl.load(logits + label, mask=here, other=0.0).to(tl.float32), CAP))


def triton_topk(
    logits: Tensor,
    k: int,
    temperatures: Sequence[float],
    labels: Tensor | None,
    softcap: float | None,
    shard: VocabularyShard,
) -> TopK:
    """The TopK of this shard, in one pass per temperature that is not 1. A label in another shard has the
    label logit 0."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    labels = None if labels is None else labels.long().contiguous()
    lse = {}
    for temperature in sorted({t for t in temperatures if t != 1.0}) or [1.0]:
        ids, largest, sums, label_logits = torch.ops.fuse_kernels.topk(
            logits, labels, k, temperature, softcap, shard.columns, shard.start
        )
        lse[temperature], lse[1.0] = sums  # every pass gives T = 1 as well
    relative_lse = torch.stack([lse[temperature] for temperature in temperatures], 1)
    return TopK(ids, largest, relative_lse, None if labels is None else label_logits)


def tile_shape(width: int, element_size: int, slots: int) -> tuple[int, int, int]:
    """(lanes, neighbouring columns of a lane, tiles up to a power of two) of topk_kernel with 8 warps."""
    neighbours = 16 // element_size
    lanes = 1024
    if interpreted():  # the interpreter's cost is per operation; four tiles, so that tests meet more than one
        lanes = max(triton.next_power_of_2(-(-width // (4 * neighbours))), slots)
    return lanes, neighbours, triton.next_power_of_2(max(-(-width // (lanes * neighbours)), 1))


@torch.library.custom_op("fuse_kernels::topk", mutates_args=())
@on_its_device
def topk(
    logits: Tensor,
    labels: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
    real_columns: int,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids and largest [n, k], log-sum-exps [2, n] at the temperature and at 1, label logits [n]."""
    outputs = _outputs(logits, k)
    if len(logits):
        ids, largest, sums, label_logits = outputs
        lanes, neighbours, tiles = tile_shape(logits.shape[1], logits.element_size(), slots_of(k))
        topk_kernel[(len(logits),)](
            logits, labels, ids, largest, sums, label_logits, logits.stride(0), len(logits), real_columns,
            start, k,
            1.0 / temperature, K=slots_of(k), C=lanes, R=neighbours, S=tiles, T_MODE=POWERS.get(temperature,
            0),
            CAP=softcap, num_warps=8,
        )  # fmt: skip
    return outputs


@topk.register_fake
def _(logits, labels, k, temperature, softcap, real_columns, start):
    return _outputs(logits, k)


def _outputs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = len(logits)
    ids = logits.new_empty((n, k), dtype=torch.int64)
    fp32 = partial(logits.new_empty, dtype=torch.float32)
    return ids, fp32((n, k)), fp32((2, n)), fp32(n)
