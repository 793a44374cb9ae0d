"""Soft-capped logits, as Gemma 2 defines them: z = c tanh(x / c) of the logits x that the output layer gives.

x between -c / 2 and c / 2 change little, and no z leaves the range from -c to c.
An infinite logit stays as it is: -inf is a masked column, which gets no probability, and not the value -c.
`triton_softcap.py` is the same for the Triton kernels.
"""

import torch
from torch import Tensor


def cap_(x: Tensor, softcap: float) -> Tensor:
    """Replaces the logits x, fp32 or fp64, by z."""
    infinite = torch.hardshrink(x, torch.finfo(x.dtype).max)  # 0 where x is finite
    return x.mul_(1 / softcap).tanh_().mul_(softcap).add_(infinite)


def slope_(x: Tensor, softcap: float) -> Tensor:
    """Replaces the logits x, fp32 or fp64, by dz / dx = 1 - (z / c)^2.

    It is computed as 1 / cosh(x / c)^2: the difference has no correct digit left where z is nearly c.
    """
    return x.mul_(1 / softcap).cosh_().square_().reciprocal_()
