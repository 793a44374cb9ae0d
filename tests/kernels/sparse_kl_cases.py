"""Random arguments of the loss with everything in them that can go wrong, and the fp64 answer to compare
with.
"""

from dataclasses import dataclass

import torch
from fuse_kernels import sparse_kl_cross_entropy
from torch import Tensor

# Of the Triton kernels, which are interpreted on a CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """Arguments for the whole vocabulary: logits [n, v] with v - vocab_size padded columns."""

    logits: Tensor
    labels: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    ce_weight: Tensor
    kl_weight: Tensor
    upstream: Tensor
    vocab_size: int


def make_case(seed: int, *, n=16, vocab=97, k=10, padding=3, dtype=torch.float32, skipped=True) -> Case:
    """Rows cycle through the odd ones (see the comments); all other values are random. 16 rows hold all odd
    ones.

    skipped: some rows weigh nothing.
    """
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab + padding, generator=g, dtype=torch.float64) * 3
    labels = torch.randint(vocab, (n,), generator=g)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(n)])
    mass = torch.rand(n, k, generator=g) + 0.01
    mass = mass / mass.sum(1, keepdim=True) * (0.05 + 0.9 * torch.rand(n, 1, generator=g))
    ce_weight, kl_weight = torch.rand(n, generator=g) + 0.1, torch.rand(n, generator=g) + 0.1

    labels[0::8] = -100  # no cross entropy
    ids[1::8, k // 2 :] = -1  # empty slots (all of them at k = 1)
    ids[2::8] = -1  # no teacher
    ids[3::8, -1] = ids[3::8, 0]  # a repeated id
    labels[3::8] = ids[3::8, 0]  # ... that is also the label
    labels[4::8] = ids[4::8, -1]  # label among the entries
    # The teacher's whole mass is stored: m = 1, rounded either way.
    mass[5::8] /= mass[5::8].sum(1, keepdim=True)
    ce_weight[6::16], kl_weight[14::16] = 0, 0  # one part only
    if skipped:
        ce_weight[7::8] = kl_weight[7::8] = 0
        logits[7::8] = torch.nan
        ids[10::16], labels[10::16] = -1, -100  # weights, but nothing to weigh
    # Certain.
    logits[3::8].scatter_add_(1, ids[3::8, :1].clamp(min=0), torch.full((n, 1), 25.0, dtype=torch.float64))
    logits[:, vocab:] = torch.nan  # padding is never looked at
    logprobs = mass.log().masked_fill(ids < 0, torch.nan)  # nor are empty slots
    # Gradients in bf16 are written forward, and rounded once more where the upstream gradient is not 1.
    upstream = torch.ones(n) if dtype == torch.bfloat16 else torch.randn(n, generator=g)
    return Case(logits.to(dtype), labels, ids, logprobs, ce_weight, kl_weight, upstream, vocab)


def run(case: Case, implementation: str, *, dtype=None, columns=slice(None), device="cpu", **options):
    """(loss, ce, kl, gradient [n, v/p] in the logits' dtype, teacher mass, student mass, agreement) of
    sum(upstream * loss), on the CPU; dtype: convert the logits first."""
    logits = case.logits[:, columns].detach().to(device, dtype or case.logits.dtype).clone().requires_grad_()
    losses = sparse_kl_cross_entropy(
        logits,
        *(tensor.to(device) for tensor in (case.labels, case.teacher_ids, case.teacher_logprobs)),
        ce_weight=case.ce_weight.to(device),
        kl_weight=case.kl_weight.to(device),
        vocab_size=case.vocab_size,
        implementation=implementation,
        **options,
    )
    losses.loss.backward(case.upstream.to(device, losses.loss.dtype))
    loss, ce, kl, *fit = (values.detach().cpu() for values in losses)
    return loss, ce, kl, logits.grad.cpu(), *fit


def exact(case: Case, **options):
    """The same through the dense formula in fp64."""
    return run(case, "reference", dtype=torch.float64, **options)


def assert_close(actual, expected, case: Case, note: str, softcap: float = torch.inf) -> None:
    """Error bounds of the loss by the logits' dtype; expected in fp64. Both from `run`."""
    dtype = case.logits.dtype
    largest = min(case.logits[case.logits.isfinite()].abs().max().item(), softcap)
    for name, a, e in zip(("loss", "ce", "kl"), actual[:3], expected[:3], strict=True):
        # A log-sum-exp cannot be more precise than one rounding of the largest logit; half types compute in
        # fp32.
        bound = 1e-13 if dtype == torch.float64 else 1e-6
        error = (a.double() - e).abs() / e.abs().clamp(min=max(1.0, largest))
        assert error.max() <= bound, (
            f"{note}: {name} of row {error.argmax()} is off by {error.max():.2e} > {bound}"
        )
    bound = (1e-13 if dtype == torch.float64 else 1e-6) * max(1.0, largest)
    for name, a, e in zip(("teacher mass", "student mass"), actual[4:6], expected[4:6], strict=True):
        assert (a.double() - e).abs().max() <= bound, (
            f"{note}: {name} is off by {(a.double() - e).abs().max():.2e}"
        )
    assert torch.equal(actual[6].double(), expected[6]), f"{note}: agreement"
    gradient, exact_gradient = actual[3].double(), expected[3]
    assert torch.isfinite(gradient).all(), f"{note}: gradient is not finite"
    error = (gradient - exact_gradient).norm()
    if dtype in (torch.bfloat16, torch.float16):
        # Against the error of merely rounding the exact gradient, plus fp32 arithmetic.
        bound = (
            1.05 * (exact_gradient.to(dtype).double() - exact_gradient).norm() + 1e-6 * exact_gradient.norm()
        )
    else:
        bound = (1e-13 if dtype == torch.float64 else 3e-6) * exact_gradient.norm()
    assert error <= bound, f"{note}: gradient is off by {error:.2e} > {bound:.2e}"
