"""The optimizer of the skills' models takes the same steps as torch's own, but for the rounding of bf16."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/skills"))
import muon


@pytest.mark.parametrize("shapes", [[(8, 8)], [(16, 8), (16, 8)], [(8, 24), (6, 6), (8, 24), (24, 8)]])
def test_the_steps_are_those_of_torch(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(3)
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    starts = [parameter.detach().clone() for parameter in ours]
    optimizer = muon.Muon(ours, lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for lr in (0.01, 0.02, 0.005):
        optimizer.lr = reference.param_groups[0]["lr"] = lr
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other, start in zip(ours, theirs, starts, strict=True):
        assert (one - other).norm() < 0.02 * (other - start).norm()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 4, 9), (2, 9, 4)])
def test_orthogonal_keeps_the_singular_vectors(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    singular = u.mT @ muon.orthogonal(matrices) @ v.mT
    values = singular.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(singular, torch.diag_embed(values))
    assert values.max() < 1.3
