"""The Muon optimizer in fp32, for matrices of a few shapes.

torch.optim.Muon computes in bf16, one matrix after the other. A CPU without bf16 arithmetic is more than ten
times slower at that than at fp32. Here all matrices of one shape are one batch in fp32. The update is that
of torch.optim.Muon: Nesterov momentum, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024,
"Muon"), then scaled to the usual size of Adam's updates (Liu et al. 2025, "Muon is scalable for LLM
training").
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.95


class Muon:
    """lr may be changed between the steps. Every parameter must be a matrix and have a gradient."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self._groups = list(groups.values())
        self._momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            gradients = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            momentum.lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonal(gradients.lerp(momentum, MOMENTUM))
            torch._foreach_mul_(group, 1 - self.lr * self.weight_decay)
            scale = 0.2 * max(group[0].shape) ** 0.5
            torch._foreach_add_(group, list(updates.unbind()), alpha=-self.lr * scale)

    def zero_grad(self) -> None:
        for group in self._groups:
            for parameter in group:
                parameter.grad = None


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, a, b] with the same singular vectors and singular values near 1."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    result = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result
