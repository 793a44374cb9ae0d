"""Distillation from sparse teachers: fused losses, and the top-k and log-sum-exps that make a sparse teacher.

The logits may be split across a tensor-parallel group.

Shapes, everywhere in this package: n rows (tokens), v columns of this rank's vocabulary shard, k stored
teacher entries, a rows that take part in the loss (a <= n), e entries whose column lies in this shard.
"""

from fuse_kernels.arguments import IMPLEMENTATIONS, TAILS
from fuse_kernels.linear import chunk_rows, fused_linear_sparse_kl
from fuse_kernels.loss import sparse_kl_cross_entropy
from fuse_kernels.rows import TokenLosses
from fuse_kernels.topk import TopK, gather_topk_logsumexp, topk_logsumexp

__all__ = [
    "IMPLEMENTATIONS",
    "TAILS",
    "TokenLosses",
    "TopK",
    "chunk_rows",
    "fused_linear_sparse_kl",
    "gather_topk_logsumexp",
    "sparse_kl_cross_entropy",
    "topk_logsumexp",
]
