"""The tensors of a case, and their restoration: an implementation may write its gradient over what it was
given.
"""

from dataclasses import dataclass

import torch
from cases import Case
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Arguments of every provider of a case: `(*leaves, *teacher, temperature)`.

    Of top_k: (logits, labels, temperature).
    """

    leaves: tuple[Tensor, ...]  # what is differentiated: (logits [n, v],) or (hidden [n, h], weight [v, h])
    masters: tuple[Tensor, ...]  # their values
    teacher: tuple[Tensor, ...]  # labels [n], teacher_ids, teacher_logprobs [n, k], ce_weight, kl_weight [n]
    temperature: float

    @property
    def forward_only(self) -> bool:
        return not self.leaves[0].requires_grad

    @property
    def arguments(self) -> tuple:
        return (*self.leaves, *self.teacher, self.temperature)

    @torch.no_grad()
    def restore(self, main_grad: bool = False) -> None:
        """Before every call, outside of what is timed, and for every provider alike.

        main_grad: the weight has an fp32 buffer that its gradient is added to, as under Megatron's data
        parallelism.
        """
        for leaf, master in zip(self.leaves, self.masters, strict=True):
            leaf.copy_(master)
        for weight in self.leaves[1:]:
            if main_grad:
                weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
            elif hasattr(weight, "main_grad"):
                del weight.main_grad


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random inputs: logits of spread 3, teacher mass 0.6 to 0.95, the label among the teacher's entries in
    half the rows.

    All rows have weight: what is measured is the loss of a whole batch. Weights are of order 1, as loss
    scaling would make them, so that a half-precision gradient does not underflow.
    """
    n, v, k = case.n, case.v, case.k
    g = torch.Generator(device).manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, device=device)

    def randn(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=case.dtype).mul_(spread)

    if case.h:
        masters = (randn(n, case.h), randn(v, case.h, spread=3 / case.h**0.5))
    else:
        masters = (randn(n, v, spread=3.0),)
    part = v // k  # one entry from each k-th of the vocabulary: all different
    teacher_ids = (
        torch.randint(part, (n, k), generator=g, device=device) + torch.arange(k, device=device) * part
    )
    teacher_logprobs = (2 * rand(n, k)).log_softmax(1) + (0.6 + 0.35 * rand(n, 1)).log()
    labels = torch.where(rand(n) < 0.5, teacher_ids[:, 0], torch.randint(v, (n,), generator=g, device=device))
    teacher = (labels, teacher_ids, teacher_logprobs, 0.1 + rand(n), 0.1 + rand(n))
    differentiable = case.kernel != "top_k"
    return Inputs(
        leaves=tuple(master.clone().requires_grad_(differentiable) for master in masters),
        masters=masters,
        teacher=teacher if differentiable else teacher[:1],
        temperature=case.temperature,
    )
