"""What capture needs of each row of logits [n, v]: the k largest, log-sum-exps relative to the largest,
and the label's logit.
"""

import functools

import fuse_kernels
import torch
from providers import Provider, fitting_implementation


def top_k_providers(k: int) -> list[Provider]:
    """Each takes logits, labels [n] and T, and returns ids [n, k], logits [n, k], log-sum-exps at T = 1
    and at T [n, 2], label_logits [n].
    """
    functions = {
        "ours": ours_top_k,
        "torch topk, logsumexp": eager,
    }
    return [Provider(name, functools.partial(function, k), None) for name, function in functions.items()]


def ours_top_k(k, logits, labels, temperature):
    implementation = fitting_implementation(logits)
    return fuse_kernels.topk_logsumexp(
        logits, k, (1.0, temperature), labels=labels, implementation=implementation
    )


def eager(k, logits, labels, temperature):
    values, ids = logits.topk(k, 1)
    relative = logits.float() - values[:, :1]
    sums = torch.stack([relative.logsumexp(1), (relative / temperature).logsumexp(1)], 1)
    return ids, values.float(), sums, logits.gather(1, labels[:, None])[:, 0].float()
