"""The checks of the public functions' arguments, and the choice of an implementation."""

import functools
import importlib.util
import math
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fuse_kernels.rows import LossOptions, VocabularyShard

TAILS = ("bucket", "renormalize", "ignore")
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")

MOST_ENTRIES = 128  # entries of a row that the Triton kernels take
# Devices that the Triton kernels run on; tensors on "meta" have shapes but no values.
_DEVICES = ("cuda", "meta")

# A log-probability that was stored in half precision, or added up across a vocabulary map,
# may be a little above 0.
_LOGPROB_ROUNDING = 1e-3


class Targets(NamedTuple):
    """Labels, teacher entries and weights of n rows; see `sparse_kl_cross_entropy`."""

    labels: Tensor  # [n]
    teacher_ids: Tensor  # [n, k]
    teacher_logprobs: Tensor  # [n, k]
    ce_weight: Tensor  # [n]
    kl_weight: Tensor  # [n]


@dataclass(frozen=True)
class Student:
    """Shape, dtype and device of the logits [rows, columns], before the logits exist.
    name: the argument they come from."""

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device


def check_options(temperature: float, tail: str, softcap: float | None) -> LossOptions:
    """The options of the loss. Raises ValueError as `sparse_kl_cross_entropy` says."""
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}. Use one of {', '.join(TAILS)}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, but must be a finite number above 0")
    return LossOptions(float(temperature), tail, check_softcap(softcap))


def check_softcap(softcap: float | None) -> float | None:
    """The cap of the logits. Raises ValueError if it is neither None nor a finite number above 0."""
    if softcap is None:
        return None
    if not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}, but must be a finite number above 0, or None for no cap")
    return float(softcap)


def check_arguments(
    student: Student,
    targets: Targets,
    *,
    vocab_size: int | None,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    check: bool | None,
) -> VocabularyShard:
    """This rank's part of the vocabulary. Raises ValueError as `sparse_kl_cross_entropy` says."""
    _check_tensors(student, targets)
    shard = make_shard(student.columns, vocab_size, vocab_start, group)
    if check is None:
        check = os.environ.get("FUSE_KERNELS_CHECK") == "1"
    if check or student.device.type == "cpu":
        _check_values(targets, shard.vocab_size)
    if check and shard.group is not None:
        _check_shards(shard, student.device)
    return shard


def choose_implementation(implementation: str, student: Student, entries: int) -> str:
    """The implementation that runs: decides "auto",
    and replaces "triton" by "torch" if rows have too many entries.

    Raises ValueError if `implementation` is none of IMPLEMENTATIONS,
    or if it is "triton" and that cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}. Use one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "auto" and student.device.type not in _DEVICES:
        return "torch"
    if implementation in ("torch", "reference"):
        return implementation
    reason = unfit_for_triton(student)
    if reason:
        if implementation == "triton":
            raise ValueError(f'implementation="triton" cannot run: {reason}. Use "auto" or "torch".')
        return "torch"
    if entries > MOST_ENTRIES:
        _warn_once(
            f"teacher_ids has {entries} entries per row, but the Triton kernels take at most {MOST_ENTRIES}: "
            "torch is used instead"
        )
        return "torch"
    return "triton"


def unfit_for_triton(student: Student) -> str | None:
    """The reason why the Triton kernels cannot take these logits, None if they can."""
    if student.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{student.name} is {student.dtype}, but the kernels take only bf16, fp16 and fp32"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if student.device.type in _DEVICES:
        return None
    if student.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"{student.name} is on {student.device}, but the kernels run on CUDA (on a CPU only interpreted, "
        "with TRITON_INTERPRET=1)"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def make_shard(
    width: int, vocab_size: int | None, vocab_start: int, group: dist.ProcessGroup | None
) -> VocabularyShard:
    """This rank's part of the vocabulary, for `width` columns with padding on each rank.

    Raises ValueError if vocab_size or vocab_start do not fit the width and the group.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1 and vocab_start != 0:
        raise ValueError(f"vocab_start is {vocab_start}, but without a group of several ranks it must be 0")
    if vocab_size is None:
        vocab_size = width * ranks
    if vocab_size < 1 or (ranks == 1 and vocab_size > width):
        raise ValueError(
            f"vocab_size is {vocab_size}, but the logits have {width} columns on each of {ranks} rank(s)"
        )
    if vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start}, but must be at least 0")
    return VocabularyShard(
        start=vocab_start,
        columns=min(max(vocab_size - vocab_start, 0), width),
        vocab_size=vocab_size,
        group=group if ranks > 1 else None,
    )


def _check_tensors(student: Student, targets: Targets) -> None:
    n = student.rows
    k = targets.teacher_ids.shape[-1] if targets.teacher_ids.dim() == 2 else "k"
    expected = {
        "labels": ([n], False),
        "teacher_ids": ([n, k], False),
        "teacher_logprobs": ([n, k], True),
        "ce_weight": ([n], True),
        "kl_weight": ([n], True),
    }
    for name, (shape, floating) in expected.items():
        tensor = getattr(targets, name)
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, but {student.name} of {n} rows need {shape}")
        if (
            tensor.dtype.is_floating_point != floating
            or tensor.dtype == torch.bool
            or tensor.dtype.is_complex
        ):
            raise ValueError(
                f"{name} is {tensor.dtype}, but must be {'floating point' if floating else 'an integer type'}"
            )
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, but {student.name} is on {student.device}")


def _check_values(targets: Targets, vocab_size: int) -> None:
    labels, teacher_ids, teacher_logprobs = targets[:3]
    _refuse(
        "labels",
        labels,
        ((labels < 0) & (labels != -100)) | (labels >= vocab_size),
        f"-100 or 0 ... {vocab_size - 1}",
    )
    _refuse(
        "teacher_ids",
        teacher_ids,
        (teacher_ids < -1) | (teacher_ids >= vocab_size),
        f"-1 or 0 ... {vocab_size - 1}",
    )
    wrong = (teacher_ids >= 0) & ~(teacher_logprobs <= _LOGPROB_ROUNDING)  # written so that NaN is wrong
    _refuse("teacher_logprobs", teacher_logprobs, wrong, "at most 0 and not NaN where teacher_ids >= 0")


def _check_shards(shard: VocabularyShard, device: torch.device) -> None:
    """Checks that the shards' columns without padding cover the vocabulary,
    each column once. One all-gather."""
    local = torch.tensor([shard.start, shard.columns], device=device)
    all_shards = [torch.empty_like(local) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(all_shards, local, group=shard.group)
    reached = 0
    for start, columns in sorted(tuple(pair.tolist()) for pair in all_shards):
        if columns and start != reached:
            raise ValueError(
                f"vocab_start: a shard begins at column {start}, but those before it end at {reached}"
            )
        reached += columns
    if reached != shard.vocab_size:
        raise ValueError(
            f"vocab_size is {shard.vocab_size}, but the group's shards hold {reached} columns of it"
        )


def _refuse(name: str, values: Tensor, wrong: Tensor, allowed: str) -> None:
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}{place} is {values[tuple(place)].item()}, but must be {allowed}")
