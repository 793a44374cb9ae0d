"""The progress of a stage, over the shards of all its plans and of all processes that make them."""

from collections.abc import Iterable, Sequence
from typing import Self

from megatron_fuse.progress import Progress, log_complete
from megatron_fuse.storage.shard_files import ShardFiles


class ShardProgress(Progress):
    """Progress whose parts are shards. Within a shard, the stage calls `update`.

    sizes: the number of items of every shard. what, unit, most: see Progress.
    """

    def __init__(self, what: object, unit: str, sizes: Sequence[int], *, most: bool = False) -> None:
        super().__init__(what, unit, sum(sizes), most=most)
        self._sizes = sizes

    def over(self, files: Iterable[ShardFiles], *, complete: int) -> Self:
        """Counts these plans, and `complete` further ones that are made already. Returns itself."""
        whole, files = sum(self._sizes), list(files)
        self._complete = complete * whole
        self.total = self._complete + len(files) * whole
        self.already = self._marked(files)
        return self

    def begin_shard(self, index: int, *, plans: int) -> None:
        """plans: for how many of the plans the shard is made."""
        self.begin_part(plans * self._sizes[index])

    def end_shard(self, files: Iterable[ShardFiles]) -> None:
        self.end_part(self._marked(files))

    def _marked(self, files: Iterable[ShardFiles]) -> int:
        return self._complete + sum(self._sizes[index] for each in files for index in each.marked())

    def log_complete(self, plans: int) -> None:
        """Logs that nothing is left to do for this number of plans."""
        log_complete(self.what, plans * sum(self._sizes), self.unit)
