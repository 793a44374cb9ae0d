"""Checks the loss kernels against the dense formula in fp64.

Random cases, offsets beyond 2^31, the largest logits, and the gradient of the weight in main_grad.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuse_kernels import TAILS, fused_linear_sparse_kl, sparse_kl_cross_entropy, topk_logsumexp
from torch import Tensor

from megatron_fuse.gpu_checks.clock import free_memory
from megatron_fuse.gpu_checks.rows import Row, failed, held, measured, not_run

_CASES = 20
_ARITHMETIC = 3e-6  # error of fp32 arithmetic, relative to the norm of a gradient
# Relative to the largest logit: a log-sum-exp in fp32 has about one rounding error of it.
_LOSS_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Problem:
    """Arguments of the loss, all on one device.

    logits [n, v]: columns from vocab_size on are padding and hold NaN.
    """

    logits: Tensor
    targets: tuple[Tensor, Tensor, Tensor]  # labels, teacher_ids, teacher_logprobs
    ce_weight: Tensor
    kl_weight: Tensor
    upstream: Tensor
    options: dict[str, Any]  # temperature, tail, vocab_size

    def rows(self, chosen: Tensor) -> "Problem":
        tensors = (self.logits, *self.targets, self.ce_weight, self.kl_weight, self.upstream)
        logits, labels, ids, logprobs, ce, kl, upstream = (tensor[chosen] for tensor in tensors)
        return Problem(logits, (labels, ids, logprobs), ce, kl, upstream, self.options)

    def solve(self, dtype: torch.dtype, implementation: str) -> tuple[Tensor, Tensor]:
        """The loss [n] and the gradient [n, v] of sum(upstream * loss), from logits of this dtype."""
        leaf = self.logits.detach().to(dtype, copy=True).requires_grad_()
        logits = leaf * 1  # a copy, because the kernel may write the gradient over the logits
        options = {"ce_weight": self.ce_weight, "kl_weight": self.kl_weight, **self.options}
        loss = sparse_kl_cross_entropy(logits, *self.targets, **options, implementation=implementation).loss
        (gradient,) = torch.autograd.grad(loss, leaf, self.upstream.to(loss.dtype))
        return loss.detach(), gradient


def run(device: str, directory: Path) -> Iterator[Row]:
    seed = random.randrange(2**31)
    yield measured("seed of the drawn cases", str(seed))
    draw = random.Random(seed)
    for _ in range(_CASES if device == "cuda" else 3):
        yield _drawn(draw, device)
    try:
        yield _far_rows(device)
    except torch.OutOfMemoryError:
        yield not_run("offsets beyond 2^31", "out of memory")
    free_memory(device)
    for dtype in (torch.bfloat16, torch.float32):
        yield _largest(device, dtype)
    for unit_upstream in (False, True):
        yield from _into_main_grad(device, unit_upstream)


def _implementation(device: str) -> str:
    return "triton" if device == "cuda" else "torch"


def _drawn(draw: random.Random, device: str) -> Row:
    dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32])
    # 97: smaller than a tile; 1003: rows not 16-byte aligned; 128256: with few rows, several programs share a
    # row
    vocab, entries = draw.choice(
        [(97, 5), (1003, 33), (32000, 10), (50432, 128), (128256, 10)][: 5 if device == "cuda" else 2]
    )
    tail, temperature = draw.choice(TAILS), draw.choice([1.0, 2.0, 4.0, 3.7])
    softcap = draw.choice([None, None, 3.0, 30.0])  # the logits' spread is 3
    n, padding = draw.choice([1, 7, 64]), draw.choice([0, 3, 64])
    problem = make_problem(
        draw.randrange(2**31),
        device,
        dtype,
        n,
        vocab,
        entries,
        padding=padding,
        tail=tail,
        temperature=temperature,
        softcap=softcap,
    )
    name = (
        f"{n} x {vocab} + {padding}, k={entries}, T={temperature:g}, {tail}, softcap={softcap}, "
        f"{str(dtype).removeprefix('torch.')}"
    )
    return _compared(name, problem.solve(dtype, _implementation(device)), problem)


def make_problem(
    seed: int,
    device: str,
    dtype: torch.dtype,
    n: int,
    vocab: int,
    entries: int,
    *,
    padding: int = 0,
    odd: bool = True,
    **options: Any,
) -> Problem:
    """A problem with random logits of standard deviation 3.

    odd: some rows have no label, no teacher, empty slots, or weights of 0 and logits of NaN. options: of the
    loss.
    """
    g = torch.Generator(device).manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, device=device)

    logits = torch.randn(n, vocab + padding, generator=g, device=device, dtype=dtype).mul_(3)
    part = vocab // entries
    ids = torch.randint(part, (n, entries), generator=g, device=device) + part * torch.arange(
        entries, device=device
    )
    logprobs = (2 * rand(n, entries)).log_softmax(1) + (0.05 + 0.9 * rand(n, 1)).log()
    labels = torch.where(rand(n) < 0.5, ids[:, 0], torch.randint(vocab, (n,), generator=g, device=device))
    ce_weight, kl_weight, upstream = 0.1 + rand(n), 0.1 + rand(n), rand(n) - 0.5
    if odd:
        labels[0::8] = -100
        ids[1::8] = -1
        ids[2::8, entries // 2 :] = -1
        ce_weight[3::8], kl_weight[3::8], logits[3::8] = 0, 0, torch.nan
        ce_weight[4::8], kl_weight[5::8] = 0, 0
        logprobs.masked_fill_(ids < 0, torch.nan)  # kernels must never read an empty slot
    logits[:, vocab:] = torch.nan  # nor padding
    targets = (labels, ids, logprobs)
    return Problem(logits, targets, ce_weight, kl_weight, upstream, {**options, "vocab_size": vocab})


def _compared(name: str, actual: tuple[Tensor, Tensor], problem: Problem) -> Row:
    """Compares loss and gradient of a problem with the dense formula in fp64.

    The row holds the larger of the two errors, each divided by its tolerance.
    """
    loss, gradient = problem.solve(torch.float64, "reference")
    largest = problem.logits.nan_to_num(0).abs().max().double().clamp(min=1)
    of_loss = (actual[0].double() - loss).abs().max() / largest / _LOSS_TOLERANCE
    of_gradient = (actual[1].double() - gradient).norm() / _tolerance(gradient, problem.logits.dtype)
    errors = torch.stack([of_loss, of_gradient])
    # max() returns NaN if any error is NaN.
    return held(name, errors.max().item(), "of the tolerance", "<= 1")


def _tolerance(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The tolerance of the norm of a gradient's error.

    The gradient is rounded to this dtype twice: when it is computed, and after the product with the upstream
    gradient.
    """
    kind = torch.finfo(dtype)
    of_subnormals = kind.smallest_normal * kind.eps / 2 * gradient.numel() ** 0.5
    return (kind.eps + _ARITHMETIC) * gradient.norm() + 2 * of_subnormals


def _far_rows(device: str) -> Row:
    """A problem with more than 2^31 logits.

    Compares the first and last rows, and those around the boundary.
    """
    n, vocab = (16640, 131072) if device == "cuda" else (40, 1024)
    problem = make_problem(0, device, torch.bfloat16, n, vocab, 10, odd=False, tail="bucket", temperature=2.0)
    chosen = (
        torch.tensor([0, n - 257, n - 256, n - 1], device=device)
        if device == "cuda"
        else torch.tensor([0, n - 1])
    )
    exact = problem.rows(chosen)
    loss, gradient = problem.solve(torch.bfloat16, _implementation(device))
    return _compared(f"rows at both ends of {n} x {vocab}", (loss[chosen], gradient[chosen]), exact)


def _largest(device: str, dtype: torch.dtype) -> Row:
    """Checks the kernel of capture: ids and logits exactly, log-sum-exps within the tolerance of the losses.

    Equal logits must come in the order of their ids.
    """
    n, vocab, k = (512, 128256, 10) if device == "cuda" else (12, 1003, 10)
    g = torch.Generator(device).manual_seed(4)
    logits = torch.randn(n, vocab, generator=g, device=device).mul_(3).to(dtype)
    labels = torch.randint(vocab, (n,), generator=g, device=device)
    temperatures = (1.0, 2.0, 3.7)
    kept = topk_logsumexp(logits, k, temperatures, labels=labels, implementation=_implementation(device))
    values, ids = logits.double().sort(dim=1, descending=True, stable=True)
    exact = logits.double()
    relative = exact - values[:, :1]
    sums = torch.stack([(relative / each).logsumexp(1) for each in temperatures], 1)
    error = (kept.relative_lse.double() - sums).abs().max() / _LOSS_TOLERANCE
    assert kept.label_logits is not None  # labels are given
    same = (
        torch.equal(kept.ids, ids[:, :k])
        and torch.equal(kept.logits.double(), values[:, :k])
        and torch.equal(kept.label_logits.double(), exact.gather(1, labels[:, None])[:, 0])
    )
    name = f"{k} largest of {n} x {vocab}, {str(dtype).removeprefix('torch.')}"
    if not same:
        return failed(name, "other ids or logits than by a stable sort")
    return held(f"{name}: log-sum-exps", error.item(), "of the tolerance", "<= 1")


def _into_main_grad(device: str, unit_upstream: bool) -> Iterator[Row]:
    """Checks the fused linear loss: the gradients of the hidden states and of the weight.

    The gradient of the weight must be added to the content of main_grad, which begins with ones.
    """
    n, h, vocab = (2048, 512, 32000) if device == "cuda" else (24, 8, 97)
    dtype = torch.bfloat16
    problem = make_problem(1, device, dtype, n, vocab, 10 if vocab > 100 else 5, odd=False)
    g = torch.Generator(device).manual_seed(2)
    hidden = torch.randn(n, h, generator=g, device=device, dtype=dtype)
    weight = torch.randn(vocab, h, generator=g, device=device, dtype=dtype).mul_(3 / h**0.5)
    upstream = torch.ones_like(problem.upstream) if unit_upstream else problem.upstream
    weights: dict[str, Any] = {
        "ce_weight": problem.ce_weight,
        "kl_weight": problem.kl_weight,
        "temperature": 2.0,
    }

    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    loss = sparse_kl_cross_entropy(
        exact[0] @ exact[1].t(), *problem.targets, **weights, implementation="reference"
    ).loss
    expected = torch.autograd.grad(loss, exact, upstream.double())

    hidden.requires_grad_()
    weight.requires_grad_()
    main_grad = torch.ones_like(weight, dtype=torch.float32)
    # Megatron gives this attribute to its parameters.
    weight.main_grad = main_grad  # type: ignore[attr-defined]
    options: dict[str, Any] = {
        "implementation": _implementation(device),
        "chunk_tokens": n // 2 - 1,
        "unit_upstream": unit_upstream,
    }
    loss = fused_linear_sparse_kl(hidden, weight, *problem.targets, **{**weights, **options}).loss
    of_hidden, _ = torch.autograd.grad(loss, (hidden, weight), upstream)
    name = f"fused linear {n} x {vocab}, h={h}" + (", unit upstream" if unit_upstream else "")
    for what, actual, wanted in (
        ("hidden states", of_hidden, expected[0]),
        ("main_grad", main_grad.double() - 1, expected[1]),
    ):
        error = ((actual.double() - wanted).norm() / wanted.norm()).item()
        # The limit is wide because the logits, too, are rounded to bf16.
        yield held(f"{name}: gradient of {what}", error, "relative error", "<= 0.02")
