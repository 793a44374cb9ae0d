"""The same losses from hidden [n, h] and weight [v, h] of the output layer, instead of from logits; see
providers.py.
"""

from functools import partial

import fuse_kernels
import torch
from providers import (
    Provider,
    absent,
    chunk_tokens,
    compiled,
    dense,
    fitting_implementation,
    ours,
    sparse_autograd,
)
from torch.utils.checkpoint import checkpoint


def fused_linear_providers() -> list[Provider]:
    exact = partial(unfused, implementation="reference")
    return [
        Provider("ours", fused, exact),
        Provider("ours, main_grad", fused, exact, main_grad=True),
        Provider("ours, main_grad, unit upstream", fused_unit_upstream, exact, main_grad=True),
        Provider("unfused", unfused, exact),
        Provider("dense eager", dense_logits, exact),
        Provider("dense torch.compile", compiled(dense_logits), exact),
        Provider("chunked checkpoint", chunked, exact),
        Provider("liger fused linear JSD", liger_jsd, liger_jsd_exact, absent("liger_kernel")),
    ]


def fused(
    hidden, weight, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature, **options
):
    return fuse_kernels.fused_linear_sparse_kl(
        hidden,
        weight,
        labels,
        teacher_ids,
        teacher_logprobs,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        temperature=temperature,
        tail="ignore",
        implementation=fitting_implementation(hidden),
        chunk_tokens=chunk_tokens(len(hidden)),
        **options,
    ).loss


def fused_unit_upstream(*arguments):
    """The sum of the losses, whose gradient needs no second product for the logits."""
    return fused(*arguments, unit_upstream=True).sum()


def unfused(hidden, weight, *rest, implementation=None):
    """All logits, then our loss on them."""
    return ours(hidden @ weight.t(), *rest, tail="ignore", implementation=implementation)


def dense_logits(hidden, weight, *rest):
    return dense(hidden @ weight.t(), *rest)


def chunked(hidden, weight, *rest):
    """As axolotl: a chunk of tokens at a time from hidden states to loss, in plain torch; the chunk is run
    again backward.
    """
    *per_token, temperature = rest
    chunk = chunk_tokens(len(hidden))

    def loss(part, *of_part):
        return sparse_autograd(part @ weight.t(), *of_part, temperature)

    parts = zip(*(tensor.split(chunk) for tensor in (hidden, *per_token)), strict=True)
    return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in parts])


def liger_jsd(hidden, weight, labels, *rest):
    """Liger's chunked output layer + cross entropy + KL (its JSD at beta 0), summed over tokens without
    weights.

    Its teacher is dense, the logits of another output layer, which it computes too: here the same weight's,
    of reversed hidden states. Another loss than ours, therefore, and the nearest that it has.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    n = len(hidden)  # it divides by them
    options = {"beta": 0.0, "temperature": rest[-1], "chunk_size": chunk_tokens(n)}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=n, weight_soft_loss=n, **options)
    return loss(hidden, weight, hidden.detach().flip(1), weight.detach(), labels)


def liger_jsd_exact(hidden, weight, labels, *rest):
    """[n], whose sum is what `liger_jsd` returns."""
    *_, temperature = rest
    logits = hidden @ weight.t()
    ce = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    teacher = ((hidden.flip(1) @ weight.t()).detach() / temperature).log_softmax(-1)
    kl = (teacher.exp() * (teacher - (logits / temperature).log_softmax(-1))).sum(-1)
    return ce + kl
