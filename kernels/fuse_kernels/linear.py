"""The loss directly from the hidden states: the output layer's product and the loss together, a chunk of
tokens at a time.

The logits of only one chunk exist at once. By default the backward pass computes them again instead of
keeping them. That takes 4 products, one more than without fusion, and the gradients are right for any
upstream gradient and any number of passes. If the caller promises an upstream gradient of 1, the forward pass
computes the gradients while it has the logits, with 3 products in all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse_kernels.arguments import Student, Targets, check_arguments, check_options, choose_implementation
from fuse_kernels.chunked import chunked_gradient_, chunked_losses, chunked_losses_and_gradient_
from fuse_kernels.reference import reference_loss
from fuse_kernels.rows import ActiveRows, LossOptions, TokenLosses, VocabularyShard, active_rows, spread

CHUNK_BYTES = 1 << 28  # bytes of the logits that exist at once, unless the caller gives chunk_tokens
_BLOCK = 8192  # rows of the weight's gradient that are added at once to an accumulator of another dtype


def chunk_rows(columns: int, element_size: int) -> int:
    """Rows of logits that exist at once by default: as many as fit into CHUNK_BYTES, a multiple of 128.

    It depends on the shapes alone, not on the free memory. All ranks must have the same number of chunks, and
    a resumed run must add its sums up in the same order.
    """
    return max(CHUNK_BYTES // (columns * element_size) // 128 * 128, 128)


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
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    check: bool | None = None,
    chunk_tokens: int | None = None,
    unit_upstream: bool = False,
) -> TokenLosses:
    """`sparse_kl_cross_entropy` of the logits hidden @ weight.T. Returns `TokenLosses`; its loss is
    differentiable in both operands.

    hidden [n, h]: the same on every rank of the group. Its gradient is summed over the group.
    weight [v, h], of the same dtype: this rank's vocabulary shard, as column-parallel output layers hold it.
    chunk_tokens: rows whose logits exist at once. None: as many as fit into CHUNK_BYTES.
    unit_upstream: the caller promises to differentiate the sum of the losses, so that the upstream gradient
        of every row is 1 (or NaN, for a step that is skipped afterwards). This takes three products instead
        of four, and the gradients exist after the forward pass: the weight's gradient is already in
        `weight.main_grad`, if there is one. Any other upstream gradient makes the gradients NaN; on a CPU it
        raises ValueError.
    The other arguments are those of `sparse_kl_cross_entropy`.

    The weight's gradient adds up over the chunks in fp32 (fp64 for fp64). If `weight.main_grad` exists, as
    under Megatron's data parallelism, it adds up there. Autograd then gets an empty sparse gradient, which
    takes no memory and tells the hooks that this weight is done.

    For "triton" the hidden states of rows without weight must be finite, because they are multiplied by
    gradients of zero. "torch" leaves such rows out of all products.

    Collectives: one all-gather per chunk forward, one all-reduce of the hidden states' gradient [n, h]
    backward. Memory beyond the results: the logits of one chunk and, without main_grad,
    the fp32 gradient of the weight.

    Raises ValueError as `sparse_kl_cross_entropy` does, and if hidden and weight do not fit each other.
    """
    if hidden.dim() != 2 or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}, but must be [n, h] and floating point"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}, but hidden of {list(hidden.shape)} "
            f"{hidden.dtype} needs [v, {hidden.shape[1]}] {hidden.dtype}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, but hidden is on {hidden.device}")
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(len(weight), weight.element_size())
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, but must be at least 1")
    options = check_options(temperature, tail, softcap)
    student = Student("hidden", len(hidden), len(weight), hidden.dtype, hidden.device)
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
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    function = _GradientsInForward if unit_upstream and needed else _FusedLinear
    # Finding the active rows would wait for the device: the Triton kernels take all rows.
    if chosen == "triton":
        passes = _triton_passes(targets, options, shard)
        return TokenLosses(*function.apply(hidden, weight, passes, chunk_tokens, shard.group))
    rows = active_rows(*targets)
    if rows.index is not None:
        hidden = hidden[rows.index]
    make_passes = _chunked_passes if chosen == "torch" else _reference_passes
    passes = make_passes(rows, options, shard)
    return spread(TokenLosses(*function.apply(hidden, weight, passes, chunk_tokens, shard.group)), rows)


@dataclass(frozen=True)
class _Passes:
    """One implementation, as functions of the logits of the rows start ... stop - 1."""

    losses: Callable[[Tensor, int, int], tuple[TokenLosses, Any]]  # logits, start, stop -> losses, state
    # Logits, upstream, state; writes the gradient over the logits.
    gradient_: Callable[[Tensor, Tensor, Any], None]
    # Both at once, for an upstream gradient of 1.
    losses_and_gradient_: Callable[[Tensor, int, int], TokenLosses]


def _triton_passes(targets: Targets, options: LossOptions, shard: VocabularyShard) -> _Passes:
    from fuse_kernels.triton_loss import triton_gradient_, triton_losses, triton_losses_and_gradient_

    def part(start: int, stop: int) -> Targets:
        return Targets(*(tensor[start:stop] for tensor in targets))

    return _Passes(
        lambda logits, start, stop: triton_losses(logits, part(start, stop), options, shard),
        lambda logits, upstream, state: triton_gradient_(logits, upstream, state, options, shard),
        lambda logits, start, stop: triton_losses_and_gradient_(logits, part(start, stop), options, shard)[0],
    )


def _chunked_passes(rows: ActiveRows, options: LossOptions, shard: VocabularyShard) -> _Passes:
    def losses_and_gradient_(logits: Tensor, start: int, stop: int) -> TokenLosses:
        part = rows.part(start, stop)
        if shard.group is None:
            return chunked_losses_and_gradient_(logits, part, options, shard)
        losses, state = chunked_losses(logits, part, options, shard)
        chunked_gradient_(logits, torch.ones_like(losses.loss), state)
        return losses

    return _Passes(
        lambda logits, start, stop: chunked_losses(logits, rows.part(start, stop), options, shard),
        chunked_gradient_,
        losses_and_gradient_,
    )


def _reference_passes(rows: ActiveRows, options: LossOptions, shard: VocabularyShard) -> _Passes:
    def losses(logits: Tensor, start: int, stop: int) -> tuple[TokenLosses, ActiveRows]:
        part = rows.part(start, stop)
        return reference_loss(logits, part, options, shard), part

    def gradient_(logits: Tensor, upstream: Tensor, part: ActiveRows) -> None:
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss = reference_loss(leaf, part, options, shard).loss
            logits.copy_(torch.autograd.grad(loss, leaf, upstream)[0])

    def losses_and_gradient_(logits: Tensor, start: int, stop: int) -> TokenLosses:
        token_losses, part = losses(logits, start, stop)
        gradient_(logits, torch.ones_like(token_losses.loss), part)
        return token_losses

    return _Passes(losses, gradient_, losses_and_gradient_)


class _FusedLinear(torch.autograd.Function):
    """Computes the logits twice: forward for the loss, backward for its gradient."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, passes: _Passes, chunk_tokens: int, group):
        results, ctx.states = [], []
        for start, stop, logits in _logits(hidden, weight, chunk_tokens):
            losses, state = passes.losses(logits, start, stop)
            results.append(losses)
            if any(ctx.needs_input_grad):
                ctx.states.append(state)
        ctx.save_for_backward(hidden, weight)
        ctx.options = (passes, chunk_tokens, group)
        ctx.set_materialize_grads(False)
        return _outputs(ctx, results)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_others):
        nothing = (None,) * 3
        if upstream is None:
            return None, None, *nothing
        hidden, weight = ctx.saved_tensors
        passes, chunk_tokens, group = ctx.options
        gradients = _Gradients.of(hidden, weight, ctx.needs_input_grad)
        chunks = _logits(hidden, weight, chunk_tokens)
        for (start, stop, logits), state in zip(chunks, ctx.states, strict=True):
            passes.gradient_(logits, upstream[start:stop], state)
            gradients.add(start, stop, logits, hidden, weight)
        return gradients.reduced(group), gradients.given(weight), *nothing


class _GradientsInForward(torch.autograd.Function):
    """Computes the logits once.

    The forward pass assumes an upstream gradient of 1; the backward pass checks it.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, passes: _Passes, chunk_tokens: int, group):
        gradients = _Gradients.of(hidden, weight, ctx.needs_input_grad)
        results = []
        for start, stop, logits in _logits(hidden, weight, chunk_tokens):
            results.append(passes.losses_and_gradient_(logits, start, stop))
            gradients.add(start, stop, logits, hidden, weight)
        ctx.gradients, ctx.group = gradients, group
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        return _outputs(ctx, results)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_others):
        nothing = (None,) * 3
        if upstream is None:
            return None, None, *nothing
        if ctx.gradients is None:
            raise RuntimeError(
                "the first backward pass has used up the gradients, so a second one is not possible. Run the "
                "forward pass again, or use unit_upstream=False."
            )
        (weight,) = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.device.type == "cpu" and (upstream.isfinite() & (upstream != 1)).any():
            raise ValueError(
                "unit_upstream is True, but the upstream gradient of a loss is not 1. Use "
                "unit_upstream=False."
            )
        # To raise an error on an accelerator would wait for it.
        # A wrong upstream gradient makes the gradients NaN instead.
        unit = upstream.where(upstream == 1, torch.nan)
        if gradients.hidden is not None:
            gradients.hidden.mul_(unit.to(gradients.hidden.dtype)[:, None])
        # One element of the weight's gradient is enough: the norm of such a step is then not finite.
        if gradients.weight is not None and len(unit):
            gradients.weight[:1, :1].mul_(unit.amin())
        return gradients.reduced(ctx.group), gradients.given(weight), *nothing


def _logits(hidden: Tensor, weight: Tensor, chunk_tokens: int):
    """Yields start, stop and the logits [stop - start, v] of each chunk, in the same memory every time."""
    buffer = hidden.new_empty((min(chunk_tokens, len(hidden)), len(weight)))
    # Without any row there is one empty chunk, which gives the results their dtypes.
    for start in range(0, max(len(hidden), 1), chunk_tokens):
        stop = min(start + chunk_tokens, len(hidden))
        yield start, stop, torch.mm(hidden[start:stop], weight.t(), out=buffer[: stop - start])


def _outputs(ctx, results: list[TokenLosses]) -> tuple[Tensor, ...]:
    """The chunks' results, concatenated. Only the loss is differentiable."""
    outputs = tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    ctx.mark_non_differentiable(*outputs[1:])
    return outputs


@dataclass(frozen=True)
class _Gradients:
    """The gradients of both operands while they add up over the chunks. None if an operand needs none."""

    hidden: Tensor | None  # [n, h]
    weight: Tensor | None  # [v, h]: main_grad, if there is one

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> "_Gradients":
        return cls(
            torch.empty_like(hidden) if needed[0] else None, _accumulator(weight) if needed[1] else None
        )

    def add(self, start: int, stop: int, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds the share of the rows start ... stop - 1. gradient [stop - start, v]: of their logits."""
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[start:stop])
        if self.weight is not None:
            _add_product(self.weight, gradient, hidden[start:stop])

    def reduced(self, group: dist.ProcessGroup | None) -> Tensor | None:
        """The gradient of the hidden states, summed over the group: one all-reduce under a group."""
        if self.hidden is not None and group is not None:
            dist.all_reduce(self.hidden, group=group)
        return self.hidden

    def given(self, weight: Tensor) -> Tensor | None:
        """What autograd gets for the weight: nothing more to add if the gradient is already in main_grad."""
        if self.weight is None:
            return None
        return _no_gradient(weight) if hasattr(weight, "main_grad") else self.weight.to(weight.dtype)


def _accumulator(weight: Tensor) -> Tensor:
    if hasattr(weight, "main_grad"):
        return weight.main_grad
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _add_product(of_weight: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """of_weight [v, h] += gradient [c, v].T @ hidden [c, h]"""
    if of_weight.dtype == gradient.dtype:
        of_weight.addmm_(gradient.t(), hidden)
    elif gradient.device.type == "cuda" and of_weight.dtype == torch.float32 and _MULTIPLIES_INTO_FP32:
        torch.addmm(of_weight, gradient.t(), hidden, out_dtype=torch.float32, out=of_weight)
    else:
        # In blocks, because the whole product would take as much memory as the weight.
        for start in range(0, len(of_weight), _BLOCK):
            block = slice(start, start + _BLOCK)
            of_weight[block].add_(gradient[:, block].t() @ hidden)


# Whether torch can add a product of half types to an fp32 matrix without rounding it first: torch 2.8 and
# later, on CUDA.
_MULTIPLIES_INTO_FP32 = "dtype_out" in torch.ops.aten.addmm.overloads()


def _no_gradient(weight: Tensor) -> Tensor:
    """A sparse gradient of zero, which takes no memory."""
    # torch's stub lacks the form of a size alone.
    return torch.sparse_coo_tensor(  # type: ignore[call-arg]
        size=weight.shape, dtype=weight.dtype, device=weight.device, check_invariants=False
    )
