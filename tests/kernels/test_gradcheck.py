"""The gradient against finite differences of the loss, in fp64: what every other test of a gradient rests
on.
"""

import pytest
import torch
from fuse_kernels import fused_linear_sparse_kl, sparse_kl_cross_entropy
from sparse_kl_cases import Case, make_case

TAILS = ("bucket", "renormalize", "ignore")


def loss_of(logits: torch.Tensor, case: Case, **options) -> torch.Tensor:
    weights = {"ce_weight": case.ce_weight, "kl_weight": case.kl_weight, "vocab_size": case.vocab_size}
    return sparse_kl_cross_entropy(
        logits, case.labels, case.teacher_ids, case.teacher_logprobs, **weights, **options
    )[0]


class _FreshLogits(torch.autograd.Function):
    """`loss_of`, whose backward makes a forward pass of its own: gradcheck walks a graph once for every
    output, and an implementation that writes the gradient over the logits can be walked but once."""

    @staticmethod
    def forward(ctx, logits, case, options):
        ctx.save_for_backward(logits)
        ctx.call = case, options
        return loss_of(logits.clone(), case, **options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        case, options = ctx.call
        logits = ctx.saved_tensors[0].clone().requires_grad_()
        with torch.enable_grad():
            loss = loss_of(logits, case, **options)
        return torch.autograd.grad(loss, logits, upstream)[0], None, None


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("tail", TAILS)
# 1, 2 and 4: one exponential serves both softmaxes; 3: the general road
@pytest.mark.parametrize(
    ("temperature", "softcap"),
    [(1.0, None), (2.0, None), (3.0, None), (4.0, None), (1.0, 3.0), (2.0, 3.0), (3.0, 3.0)],
)
def test_gradient_is_the_derivative(temperature, softcap, tail, implementation, seed):
    case = make_case(seed, n=8, vocab=7, k=3, padding=1, dtype=torch.float64)
    # Finite differences cannot step from NaN, nor see what is left of a softmax as sharp as the cases'
    # certain row.
    logits = case.logits.nan_to_num(0.0).clamp(-6, 6).requires_grad_()
    options = {
        "temperature": temperature,
        "tail": tail,
        "softcap": softcap,
        "implementation": implementation,
    }
    assert torch.autograd.gradcheck(
        _FreshLogits.apply, (logits, case, options), eps=1e-6, atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("tail", TAILS)
def test_gradients_of_the_fused_linear_are_the_derivatives(tail, implementation, seed):
    case = make_case(seed, n=8, vocab=7, k=3, padding=1, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(8, 2, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(case.logits.shape[1], 2, generator=g, dtype=torch.float64).requires_grad_()
    weights = {"ce_weight": case.ce_weight, "kl_weight": case.kl_weight, "vocab_size": case.vocab_size}
    options = {"temperature": 2.0, "tail": tail, "implementation": implementation, "chunk_tokens": 3}

    def loss(hidden, weight):
        targets = case.labels, case.teacher_ids, case.teacher_logprobs
        return fused_linear_sparse_kl(hidden, weight, *targets, **weights, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight), eps=1e-6, atol=1e-7, rtol=1e-5)
