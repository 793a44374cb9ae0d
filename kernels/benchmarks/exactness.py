"""Whether a provider computes what it is measured for: its gradient beside the dense one in fp64, on a few rows.

Run at the full size, so that it is the timed call that is checked, on rows at both ends, where offsets are smallest and largest.
"""

import torch
from inputs import Inputs
from providers import Provider
from torch import Tensor

# Relative, of the norm. They tell a wrong formula from rounding, also of logits that were themselves rounded to half types:
# how exact our own kernels are is for their tests to say.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def gradient_error(provider: Provider, inputs: Inputs, ends: int = 4) -> float:
    """Largest relative difference from the exact gradient: of one of the first and last `ends` rows, or of the weight."""
    n = len(inputs.leaves[0])
    rows = torch.arange(n, device=inputs.leaves[0].device)
    rows = torch.cat((rows[:ends], rows[max(ends, n - ends) :]))
    inputs.restore(provider.main_grad)
    loss = provider.loss(*inputs.arguments)
    if loss.dim():  # no other row may add to the gradient of the weight
        upstream = torch.zeros_like(loss).index_fill(0, rows, 1.0)
        actual = torch.autograd.grad(loss, inputs.leaves, upstream)
    else:  # a sum over all rows: the gradient of the weight is left unchecked
        actual = torch.autograd.grad(loss, inputs.leaves)[:1]
    if provider.main_grad:
        actual = (actual[0], inputs.leaves[1].main_grad)
    exact = _exact(provider, inputs, rows)
    differences = [_difference(actual[0][rows], exact[0], dim=1)]
    differences += [_difference(a, e) for a, e in zip(actual[1:], exact[1:], strict=False)]
    return torch.stack(differences).max().item()  # NaN wins


def _exact(provider: Provider, inputs: Inputs, rows: Tensor) -> tuple[Tensor, ...]:
    first, *others = inputs.masters  # only the first has the tokens as its rows
    leaves = [leaf.double().requires_grad_() for leaf in (first[rows], *others)]
    teacher = (tensor[rows] for tensor in inputs.teacher)
    loss = provider.exact(*leaves, *teacher, inputs.temperature)
    return torch.autograd.grad(loss.sum(), leaves)


def _difference(actual: Tensor, exact: Tensor, dim: int | None = None) -> Tensor:
    return ((actual.double() - exact).norm(dim=dim) / exact.norm(dim=dim)).max()
