"""The ranks that hold one copy of a source together, and what they tell each other.

The copies are data-parallel: each copy makes its own shards. One rank of a copy leads: it takes the shards
(storage/stage.py), announces each to the others, and writes the file. The others only compute. So a single
rank decides which shard is made next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fuse.runtime import Runtime
from megatron_fuse.storage import Share

_NO_MORE = -1
# A rank may wait for days until another process has made its shards. torchrun ends the ranks that wait for
# one that has failed. The collectives of a batch keep Megatron's own, short limit: if a rank is lost, they
# end.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class SourceRanks:
    """The ranks of one copy.

    copy, everyone: the ranks of this copy and of all copies, for messages that may be waited for long.
    leader: its rank in the world: the first tensor-parallel rank of the last stage, which has the rows.
    share: the shards of this copy.
    """

    copy: dist.ProcessGroup
    everyone: dist.ProcessGroup
    leader: int
    share: Share
    device: torch.device

    @classmethod
    def of(cls, runtime: Runtime) -> "SourceRanks":
        own = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        copies: list[list[int]] = [[]] * runtime.world_size
        dist.all_gather_object(copies, own)
        groups = {  # every rank takes part in the making of every group
            ranks: dist.new_group(list(ranks), timeout=_PATIENCE, backend="gloo")
            for ranks in sorted(set(map(tuple, copies)))
        }
        everyone = dist.new_group(timeout=_PATIENCE, backend="gloo")
        # In the order of the group, the tensor-parallel ranks of a stage follow one another.
        leader = own[-runtime.tensor_model_parallel_size]
        share = (runtime.data_parallel_rank, runtime.data_parallel_size)
        return cls(groups[tuple(own)], everyone, leader, share, runtime.device)

    @property
    def is_leader(self) -> bool:
        return dist.get_rank() == self.leader

    def announce(self, shard: int) -> None:
        """The leader begins a shard."""
        self._broadcast(shard)

    def announced(self) -> Iterator[int]:
        """The shards that the leader begins, until it has none left. For the other ranks."""
        while (shard := self._broadcast(_NO_MORE)) != _NO_MORE:
            yield shard

    def dismiss(self) -> None:
        """The leader has no shard left."""
        self._broadcast(_NO_MORE)

    def leave(self) -> None:
        """Waits for the ranks of all copies: without torchrun, the first rank holds what the others need to
        connect.
        """
        dist.barrier(self.everyone)
        for group in (self.copy, self.everyone):
            dist.destroy_process_group(group)

    def _broadcast(self, shard: int) -> int:
        message = torch.tensor([shard])
        dist.broadcast(message, src=self.leader, group=self.copy)
        return int(message)


class PipelineNeighbours:
    """Hidden states from the stage before this one, and to the stage after it.

    Every rank of a copy makes the same batches, so that a stage knows the shape of what it receives. A stage
    sends without waiting for the next one: it computes the next batch at once, and waits only if its last
    message is still under way.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(self._group)
        place = ranks.index(dist.get_rank())
        self.is_first, self.is_last = place == 0, place == len(ranks) - 1
        self._before, self._after = ranks[place - 1], ranks[(place + 1) % len(ranks)]
        self._dtype, self._device = dtype, device
        self._sent: tuple[dist.Work, torch.Tensor] | None = None  # the tensor must live until it is sent

    def receive(self, shape: tuple[int, ...]) -> torch.Tensor:
        hidden_states = torch.empty(shape, dtype=self._dtype, device=self._device)
        dist.recv(hidden_states, src=self._before, group=self._group)
        return hidden_states

    def send(self, hidden_states: torch.Tensor) -> None:
        self.finish()
        hidden_states = hidden_states.contiguous()
        work = dist.isend(hidden_states, dst=self._after, group=self._group)
        assert work is not None  # this rank belongs to the group
        self._sent = (work, hidden_states)

    def finish(self) -> None:
        """Waits until the last message is sent."""
        if self._sent:
            self._sent[0].wait()
            self._sent = None
