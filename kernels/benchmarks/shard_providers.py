"""Ours on one shard of a vocabulary that a tensor-parallel group splits: with the group's collective, without
its other ranks.

torch's fake backend hands every rank its own statistics for those of the others. So what is measured is one
shard's kernels and the copies of one all-gather, without the time that it waits for others. The loss is
another one: each shard repeats this one. Its gradient is exactly that of a vocabulary of such copies for the
tail "ignore", where only the whole sum of exponentials counts.
"""

import functools

import torch
import torch.distributed as dist
from providers import Provider, ours


def shard_providers(shards: int) -> list[Provider]:
    loss, exact = functools.partial(shard_loss, shards), functools.partial(copies_loss, shards)
    return [Provider("ours", loss, exact)]


def shard_loss(shards, logits, *rest):
    vocabulary = {"vocab_size": shards * logits.shape[1], "vocab_start": 0, "group": fake_group(shards)}
    return ours(logits, *rest, tail="ignore", **vocabulary)


def copies_loss(shards, logits, *rest):
    """Of the whole vocabulary: this shard, and as many copies of it that are constants."""
    whole = torch.cat([logits, *[logits.detach()] * (shards - 1)], 1)
    return ours(whole, *rest, tail="ignore", implementation="reference")


def fake_group(shards: int) -> dist.ProcessGroup:
    """This process's default group, whose other ranks do not exist. RuntimeError if it has another one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)
    if dist.get_world_size() != shards:
        raise RuntimeError(
            f"this process is in a group of {dist.get_world_size()} ranks, but {shards} are needed"
        )
    return dist.group.WORLD
