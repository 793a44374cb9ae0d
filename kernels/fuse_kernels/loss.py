"""The loss of given logits: checks the arguments and passes the active rows to one implementation."""

import torch
import torch.distributed as dist
from torch import Tensor

from fuse_kernels.arguments import Student, Targets, check_arguments, check_options, choose_implementation
from fuse_kernels.chunked import chunked_loss
from fuse_kernels.reference import reference_loss
from fuse_kernels.rows import TokenLosses, VocabularyShard, active_rows, spread


def sparse_kl_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float = 1.0,
    tail: str = "bucket",
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    check: bool | None = None,
) -> TokenLosses:
    """Per row: loss = ce_weight * -log q_1[label] + kl_weight * D(teacher, q_T), with q_T = softmax(z / T),
    where z are the logits, soft-capped if there is a `softcap`.

    logits [n, v] bf16, fp16, fp32 or fp64: this rank's vocabulary shard, columns vocab_start ... vocab_start
        + v - 1.
    labels [n]: global ids, -100 = no cross entropy in this row.
    teacher_ids [n, k]: global ids, -1 = empty slot (its log-probability is never read). The masses of a
        repeated id add up.
    teacher_logprobs [n, k]: natural logarithms, already at the KL temperature.
    ce_weight, kl_weight [n]: constant factors of the loss. Masks, 1 / tokens, lambda and T^2 are part of
        them.
    temperature: T of the student. The gradient contains its 1 / T; the factor T^2, if wanted, is part of
        kl_weight.
    softcap: c of z = c tanh(logits / c), as Gemma 2 caps its logits. `logits` are those before the cap, and
        so is the gradient. The cap is computed in fp32. Infinite logits stay as they are, so that -inf is a
        masked column. None: z are the logits.
    vocab_size: columns of all shards without padding. Columns beyond it are in no log-sum-exp and get
        gradient 0. None: the shards are equally wide and have no padding.
    group: the tensor-parallel process group. All arguments but `logits` are the same on all of its ranks.
    implementation: "triton" (fused kernels; CUDA, at most 128 entries), "torch" (sparse, in row chunks; any
        device), "reference" (dense, plain autograd, for tests), "auto" (triton if it can run, else torch).
    check: True: check the values of the arguments, which on an accelerator waits for the device, and compare
        the group's shards, which takes a collective. On a CPU the values are always checked. None: as True if
        the environment has FUSE_KERNELS_CHECK=1, else as False.

    Returns `TokenLosses`, equal on every rank of the group: the loss, differentiable in the logits; detached
    and unweighted ce and kl; how well student and teacher agree. ce_weight counts only in rows with a label,
    kl_weight only in rows with a teacher entry. A row in which neither weight counts is skipped: its results
    and its gradient are 0, whatever its logits hold. In all other rows ce is reported if there is a label,
    and kl if there is a teacher entry, also at weight 0.

    D, with p the stored teacher mass, m its sum, q = q_T, M the student's mass on the stored ids:
        bucket       sum p log(p / q) + (1 - m) log((1 - m) / (1 - M)); no tail term if m >= 1 or no column is
                     off the ids
        renormalize  sum (p / m) log((p / m) / q); 0 if m = 0
        ignore       sum p log(p / q); can be negative

    The gradient is written over the logits, in their dtype. So no code may read the logits after this call,
    and a second backward pass raises RuntimeError. If the logits need a gradient and there is no group, the
    forward pass writes it while a row is still in the cache. The backward pass then multiplies only the rows
    whose upstream gradient is not 1, which rounds them a second time. Under a group the backward pass writes
    the gradient; so it does in fp16, whose gradients need their loss scale before they are rounded. Logits
    that need no gradient stay as they are. "reference" always keeps the logits.

    Collectives: one all-gather of seven numbers per row forward (fp64 in "torch", fp32 in "triton"), none
    backward. Memory: nothing as large as the logits; scratch is 1 MB per thread in "torch", nothing in
    "triton". ("reference" holds several tensors of their size.) Differentiable once.

    Raises ValueError, which names the argument and both values, if shapes, dtypes or devices do not fit, or
    if "triton" is given and cannot run. If values are checked, also if ids or log-probabilities are out of
    range, or if the group's shards do not tile the vocabulary.
    """
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits is {list(logits.shape)} {logits.dtype}, but must be [n, v] and floating point"
        )
    options = check_options(temperature, tail, softcap)
    student = Student("logits", logits.shape[0], logits.shape[1], logits.dtype, logits.device)
    targets = Targets(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
    shard = check_arguments(
        student,
        targets,
        vocab_size=vocab_size,
        vocab_start=vocab_start,
        group=group,
        check=check,
    )
    chosen = choose_implementation(implementation, student, teacher_ids.shape[1])
    if chosen == "triton":
        from fuse_kernels.triton_loss import triton_loss

        return triton_loss(logits, targets, options, shard, in_forward=_in_forward(logits, shard))
    rows = active_rows(*targets)
    if chosen == "torch":
        losses = chunked_loss(logits, rows, options, shard, in_forward=_in_forward(logits, shard))
    else:
        losses = reference_loss(logits, rows, options, shard)
    return spread(losses, rows)


def _in_forward(logits: Tensor, shard: VocabularyShard) -> bool:
    """Whether the forward pass writes the gradient."""
    needed = torch.is_grad_enabled() and logits.requires_grad
    return needed and shard.group is None and logits.dtype != torch.float16
