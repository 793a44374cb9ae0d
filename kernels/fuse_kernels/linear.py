"""The loss straight from the hidden states: the output layer's product and the loss together, a chunk of tokens at a time.

No more than one chunk's logits exist at once. Backward multiplies them out again rather than keep them: one product more than the
unfused way (4 for 3), and its gradients are right for any upstream gradient and any number of passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse_kernels.arguments import Student, Targets, check_arguments, choose_implementation
from fuse_kernels.chunked import chunked_gradient_, chunked_losses
from fuse_kernels.reference import reference_loss
from fuse_kernels.rows import ActiveRows, VocabularyShard, active_rows, spread

_BLOCK = 8192  # rows of the weight whose gradient is added to an accumulator of another type at once
CHUNK_TOKENS = 1024  # rows of logits that exist at once, unless told otherwise


def fused_linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float = 1.0,
    tail: str = "bucket",
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    check: bool | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_kl_cross_entropy` of the logits hidden @ weight.T: loss, ce, kl [n], the loss differentiable in both.

    hidden [n, h]: the same on every rank of the group; its gradient is summed over the group. weight [v, h], of the same dtype: this
    rank's vocabulary shard, as column-parallel output layers hold it. The other arguments are those of `sparse_kl_cross_entropy`.
    chunk_tokens: rows whose logits exist at once.

    The weight's gradient adds up over the chunks in fp32 (fp64 for fp64). Where `weight.main_grad` exists, as under Megatron's data
    parallelism, it is added there, and autograd is given an empty sparse gradient: it weighs nothing and tells the hooks that this
    weight is done.

    Hidden states of rows that weigh nothing have to be finite for "triton", which multiplies them by gradients of zero; "torch"
    leaves such rows out of all products.

    Collectives: one all-gather a chunk forward, one all-reduce of the hidden states' gradient [n, h] backward. Memory beyond the
    results: the logits of one chunk, and without main_grad the fp32 gradient of the weight.

    Raises ValueError as `sparse_kl_cross_entropy` does, and where hidden and weight do not fit each other.
    """
    if hidden.dim() != 2 or not hidden.dtype.is_floating_point:
        raise ValueError(f"hidden is {list(hidden.shape)} {hidden.dtype}: it must be [n, h] and floating point")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}: hidden of {list(hidden.shape)} {hidden.dtype} needs "
            f"[v, {hidden.shape[1]}] {hidden.dtype}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, but hidden is on {hidden.device}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: it must be at least 1")
    student = Student("hidden", len(hidden), len(weight), hidden.dtype, hidden.device)
    targets = Targets(labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight)
    vocabulary = {"vocab_size": vocab_size, "vocab_start": vocab_start, "group": group}
    shard = check_arguments(student, targets, temperature=temperature, tail=tail, check=check, **vocabulary)
    chosen = choose_implementation(implementation, student, teacher_ids.shape[1])
    temperature = float(temperature)
    if chosen == "triton":  # to find the rows that take part would be to wait for the device
        return _FusedLinear.apply(
            hidden, weight, _triton_passes(targets, temperature, tail, shard), chunk_tokens, shard.group
        )
    rows = active_rows(*targets)
    if rows.index is not None:
        hidden = hidden[rows.index]
    make_passes = _chunked_passes if chosen == "torch" else _reference_passes
    losses = _FusedLinear.apply(hidden, weight, make_passes(rows, temperature, tail, shard), chunk_tokens, shard.group)
    loss, ce, kl = (spread(values, rows) for values in losses)
    return loss, ce, kl


@dataclass(frozen=True)
class _Passes:
    """An implementation over the logits of rows start ... stop - 1."""

    losses: Callable[[Tensor, int, int], tuple[tuple[Tensor, Tensor, Tensor], Any]]  # logits -> (loss, ce, kl), state
    gradient_: Callable[[Tensor, Tensor, Any], None]  # logits, upstream, state: the gradient is written over the logits


def _triton_passes(targets: Targets, temperature: float, tail: str, shard: VocabularyShard) -> _Passes:
    from fuse_kernels.triton_loss import triton_gradient_, triton_losses

    return _Passes(
        lambda logits, start, stop: triton_losses(
            logits, *(tensor[start:stop] for tensor in targets), temperature, tail, shard
        ),
        lambda logits, upstream, state: triton_gradient_(logits, upstream, state, temperature, shard),
    )


def _chunked_passes(rows: ActiveRows, temperature: float, tail: str, shard: VocabularyShard) -> _Passes:
    return _Passes(
        lambda logits, start, stop: chunked_losses(logits, rows.part(start, stop), temperature, tail, shard),
        chunked_gradient_,
    )


def _reference_passes(rows: ActiveRows, temperature: float, tail: str, shard: VocabularyShard) -> _Passes:
    def losses(logits: Tensor, start: int, stop: int) -> tuple[tuple[Tensor, Tensor, Tensor], ActiveRows]:
        part = rows.part(start, stop)
        return reference_loss(logits, part, temperature, tail, shard), part

    def gradient_(logits: Tensor, upstream: Tensor, part: ActiveRows) -> None:
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss, _, _ = reference_loss(leaf, part, temperature, tail, shard)
            logits.copy_(torch.autograd.grad(loss, leaf, upstream)[0])

    return _Passes(losses, gradient_)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, passes: _Passes, chunk_tokens: int, group):
        results, ctx.states = [], []
        buffer = _logits_buffer(hidden, weight, chunk_tokens)
        # An empty chunk is a chunk too: it has the results' types.
        for start in range(0, max(len(hidden), 1), chunk_tokens):
            stop = min(start + chunk_tokens, len(hidden))
            logits = torch.mm(hidden[start:stop], weight.t(), out=buffer[: stop - start])
            losses, state = passes.losses(logits, start, stop)
            results.append(losses)
            if any(ctx.needs_input_grad):
                ctx.states.append((start, stop, state))
        ctx.save_for_backward(hidden, weight)
        ctx.options = (passes, chunk_tokens, group)
        ctx.set_materialize_grads(False)
        loss, ce, kl = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _ce, _kl):
        nothing = (None,) * 3
        if upstream is None:
            return None, None, *nothing
        hidden, weight = ctx.saved_tensors
        passes, chunk_tokens, group = ctx.options
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = _accumulator(weight) if ctx.needs_input_grad[1] else None
        buffer = _logits_buffer(hidden, weight, chunk_tokens)
        for start, stop, state in ctx.states:
            logits = torch.mm(hidden[start:stop], weight.t(), out=buffer[: stop - start])
            passes.gradient_(logits, upstream[start:stop], state)
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[start:stop])
            if of_weight is not None:
                _add_product(of_weight, logits, hidden[start:stop])
        if of_hidden is not None and group is not None:
            dist.all_reduce(of_hidden, group=group)
        if of_weight is not None:
            of_weight = _no_gradient(weight) if hasattr(weight, "main_grad") else of_weight.to(weight.dtype)
        return of_hidden, of_weight, *nothing


def _logits_buffer(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    return hidden.new_empty((min(chunk_tokens, len(hidden)), len(weight)))


def _accumulator(weight: Tensor) -> Tensor:
    if hasattr(weight, "main_grad"):
        return weight.main_grad
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _add_product(of_weight: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """of_weight [v, h] += gradient [c, v].T @ hidden [c, h]"""
    if of_weight.dtype == gradient.dtype:
        of_weight.addmm_(gradient.t(), hidden)
        return
    for start in range(0, len(of_weight), _BLOCK):  # the product in the operands' dtype would be as large as the weight
        block = slice(start, start + _BLOCK)
        of_weight[block].add_(gradient[:, block].t() @ hidden)


def _no_gradient(weight: Tensor) -> Tensor:
    """A gradient of zero that takes no memory."""
    place = {"dtype": weight.dtype, "device": weight.device}
    return torch.sparse_coo_tensor(size=weight.shape, **place, check_invariants=False)
