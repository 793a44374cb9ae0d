"""Whether a provider computes what it is measured for: its gradient, or its largest logits, beside fp64, on a
few rows.

Run at the full size, so that it is the timed call that is checked, on rows at both ends, where offsets are
smallest and largest.
"""

import torch
from inputs import Inputs
from providers import Provider
from torch import Tensor

# Relative, of the norm. They tell a wrong formula from rounding, also of logits that were themselves rounded
# to half types: how exact our own kernels are is for their tests to say.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def error_of(provider: Provider, inputs: Inputs) -> float:
    """Largest relative difference from what is exact."""
    return top_k_error(provider, inputs) if inputs.forward_only else gradient_error(provider, inputs)


def top_k_error(provider: Provider, inputs: Inputs) -> float:
    """Of the k largest logits in falling order, the log-sum-exps relative to the largest, and the label's
    logit; infinite if an id has another logit.

    Which of equal logits is taken is left open.
    """
    rows = _rows_at_ends(inputs)
    ids, logits, relative_lse, label_logits = (values[rows] for values in provider.loss(*inputs.arguments))
    exact = inputs.masters[0][rows].double()
    labels, temperature = inputs.arguments[1][rows], inputs.temperature
    relative = exact - exact.amax(1, keepdim=True)
    wanted = torch.stack([(relative / each).logsumexp(1) for each in (1.0, temperature)], 1)
    if not torch.equal(exact.gather(1, ids), logits.double()):
        return torch.inf
    pairs = (
        (logits, exact.topk(logits.shape[1], 1).values),
        (relative_lse, wanted),
        (label_logits, exact.gather(1, labels[:, None])[:, 0]),
    )
    return torch.stack([_difference(actual, of_exact) for actual, of_exact in pairs]).max().item()


def gradient_error(provider: Provider, inputs: Inputs) -> float:
    """Of one of the first and last rows' gradient, or of the weight's."""
    rows = _rows_at_ends(inputs)
    inputs.restore(provider.main_grad)
    loss = provider.loss(*inputs.arguments)
    if loss.dim():  # no other row may add to the gradient of the weight
        upstream = torch.zeros_like(loss).index_fill(0, rows, 1.0)
        actual = torch.autograd.grad(loss, inputs.leaves, upstream)
        if provider.main_grad:
            actual = (actual[0], inputs.leaves[1].main_grad)
    else:  # a sum over all rows: the gradient of the weight is left unchecked
        actual = torch.autograd.grad(loss, inputs.leaves)[:1]
    exact = _exact(provider, inputs, rows)
    differences = [_difference(actual[0][rows], exact[0], dim=1)]
    differences += [_difference(a, e) for a, e in zip(actual[1:], exact[1:], strict=False)]
    return torch.stack(differences).max().item()  # NaN wins


def _rows_at_ends(inputs: Inputs, ends: int = 4) -> Tensor:
    n = len(inputs.leaves[0])
    rows = torch.arange(n, device=inputs.leaves[0].device)
    return torch.cat((rows[:ends], rows[max(ends, n - ends) :]))


def _exact(provider: Provider, inputs: Inputs, rows: Tensor) -> tuple[Tensor, ...]:
    first, *others = inputs.masters  # only the first has the tokens as its rows
    leaves = [leaf.double().requires_grad_() for leaf in (first[rows], *others)]
    teacher = (tensor[rows] for tensor in inputs.teacher)
    loss = provider.exact(*leaves, *teacher, inputs.temperature)
    return torch.autograd.grad(loss.sum(), leaves)


def _difference(actual: Tensor, exact: Tensor, dim: int | None = None) -> Tensor:
    return ((actual.double() - exact).norm(dim=dim) / exact.norm(dim=dim)).max()
