"""Checkpoints through Megatron's dist_checkpointing: complete or absent, and loadable at any tensor, pipeline
and data layout.

    DIRECTORY/iter_0000120/                       sharded model and optimizer, facts.json, and checksums.json
                                                  of all files
    DIRECTORY/latest_checkpointed_iteration.txt   as Megatron-LM names it; written last
    DIRECTORY/best_checkpointed_iteration.txt     the checkpoint with the least validation cross-entropy

After the weights are initialised, training draws no random number: the order of samples is a function of the
seed, and dropout is 0. So consumed samples, model and optimizer are the whole state.

The files of all ranks go into a hidden directory. When they are on disk, the directory gets the checkpoint's
name. Then `best` and last `latest` name it, and only then old checkpoints are removed. In an asynchronous
save a process forked from each rank writes the state of that moment while training continues. Tensors on a
GPU are copied to the host first; for tensors on a CPU the fork itself is the copy.
"""

import multiprocessing.util
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.transformer.module import Float16Module
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.processes import end_with_pool
from megatron_fuse.runtime.megatron_versions import adopt_learning_rates
from megatron_fuse.storage import write_json
from megatron_fuse.training import megatron_checkpoints
from megatron_fuse.training.checkpoint_content import OpenedCheckpoint, open_for_loading
from megatron_fuse.training.checkpoint_files import (
    BEST,
    LATEST,
    Retention,
    checkpoints_in,
    free_bytes,
    publish,
    remove_checkpoint,
    remove_leftovers,
    temporary_name,
)
from megatron_fuse.training.checkpoint_integrity import CheckpointFiles, StoredItems, write_checksums
from megatron_fuse.training.checkpoint_metadata import (
    CheckpointMetadata,
    iteration_directory,
    metadata_in,
    named_iteration,
    open_files,
    refuse_other_model,
)
from megatron_fuse.training.interruption import signals_held
from megatron_fuse.training.only_one import only_one_run
from megatron_fuse.training.write_results import use_new_write_results

T = TypeVar("T")
# The only form of the distributed optimizer's state that loads at every layout. The older default raises an
# error on saving.
_OPTIMIZER_FORM = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # The state is gathered over gloo, bucket by bucket, into the host memory of the first data-parallel rank.
    # That takes 12 bytes per parameter of its tensor and pipeline rank, and one bucket. Otherwise every rank
    # would gather the same state on its GPU and its host.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
# Transformer Engine's layers add scales of fp8 to the state of a model. fp8 is not used here, and without the
# scales a checkpoint loads into layers of either implementation. Its experts number them from the second on.
_EXTRA_STATE = re.compile(r"(.*\.)?_extra_state\d*")


def _by_name(chunks: Sequence[FusionGPTModel]) -> dict[str, FusionGPTModel]:
    """Model chunks by the names that Megatron-LM gives them in a checkpoint."""
    return (
        {"model": chunks[0]}
        if len(chunks) == 1
        else {f"model{index}": chunk for index, chunk in enumerate(chunks)}
    )


def _state(chunks: Sequence[FusionGPTModel], optimizer: Any | None, *, loading: bool) -> dict[str, Any]:
    state = {
        name: _without_extra_state(chunk.sharded_state_dict()) for name, chunk in _by_name(chunks).items()
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=_OPTIMIZER_FORM)
    return state


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not _EXTRA_STATE.fullmatch(key)}


def _load_weights(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Fills a chunk. Raises RuntimeError, as load_state_dict does, if a weight is missing or unknown."""
    # Float16Module does not report missing weights.
    model = chunk.module if isinstance(chunk, Float16Module) else chunk
    missing, unknown = model.load_state_dict(state, strict=False)
    if wrong := [key for key in (*missing, *unknown) if not _EXTRA_STATE.fullmatch(key)]:
        raise RuntimeError(
            f"the model and its checkpoint do not have the same weights: {', '.join(wrong[:5])}"
        )


class CheckpointWriter:
    """Saves the checkpoints of one run. At its start it removes the incomplete files of killed runs. All
    ranks call every method.

    chunks: this rank's model chunks before data parallelism wraps them.
    optimizer: None: save the weights alone.
    """

    def __init__(
        self,
        directory: Path,
        chunks: Sequence[FusionGPTModel],
        optimizer: Any | None,
        *,
        retention: Retention | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.directory, self.chunks, self.optimizer = directory, chunks, optimizer
        self.retention = retention or Retention()
        self.asynchronous = asynchronous
        self._queue = AsyncCallsQueue()
        self._bytes = 0  # of one checkpoint, all ranks
        # multiprocessing forks the writers. This makes each of them end together with this process.
        multiprocessing.util.register_after_fork(self, lambda _: end_with_pool())
        if dist.get_rank() == 0:
            remove_leftovers(directory)

    def save(self, metadata: CheckpointMetadata, *, best: bool = False) -> Path:
        """Writes a checkpoint and returns its path. An asynchronous save is complete only after
        publish_finished or finish.

        best: make `best` name this checkpoint. Raises UserError if it cannot be written, on the rank or ranks
        that know the reason. Earlier checkpoints stay as they are.
        """
        self.finish()
        final = iteration_directory(self.directory, metadata.iteration)
        state = _state(self.chunks, self.optimizer, loading=False)
        self._bytes = _bytes_of_all_ranks(state)
        temporary = self._on_rank_zero(lambda: self._begin(final))
        use_new_write_results()
        with signals_held():
            try:
                request, written = megatron_checkpoints.request_save(state, temporary)
                request.add_finalize_fn(
                    lambda: self._on_rank_zero(lambda: self._publish(temporary, written, metadata, best))
                )
                if self.asynchronous:
                    self._queue.schedule_async_request(request)
                else:
                    request.execute_sync()
            except (OSError, RuntimeError, CheckpointException) as error:
                raise self._explained(error) from error
        return final

    def publish_finished(self) -> None:
        """Called between two steps: publishes an asynchronous save that all ranks have written. Without such
        a save it costs nothing."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits for the save that is under way, if any."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._explained(error) from error

    def _begin(self, final: Path) -> Path:
        temporary = temporary_name(final)
        temporary.mkdir(parents=True)
        return temporary

    def _publish(
        self, temporary: Path, written: dict[str, StoredItems], metadata: CheckpointMetadata, best: bool
    ) -> None:
        write_json(temporary / "facts.json", asdict(metadata))
        write_checksums(temporary, written)
        trackers = [self.directory / which for which in ([BEST, LATEST] if best else [LATEST])]
        publish(temporary, iteration_directory(self.directory, metadata.iteration), trackers)
        checkpoints = checkpoints_in(self.directory)
        named = {named_iteration(self.directory, which) for which in (BEST, LATEST)}
        for iteration in self.retention.expired(checkpoints, metadata.iteration, named):
            remove_checkpoint(checkpoints[iteration])

    def _on_rank_zero(self, action: Callable[[], T]) -> T:
        """The result of rank 0's action, on every rank. If the action fails, every rank raises the same
        UserError. One broadcast."""
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                outcome = [action(), None]
            except (OSError, UserError) as error:
                outcome = [None, str(self._explained(error))]
        dist.broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise UserError(failure)
        return result

    def _explained(self, error: BaseException) -> BaseException:
        """The UserError for a failed save, whose files it removes.

        An error with another cause is returned as it is.
        """
        if isinstance(error, UserError) and not isinstance(error.__cause__, OSError):
            return error
        if dist.get_rank() == 0:
            remove_leftovers(self.directory)
        free = free_bytes(self.directory)
        # torch.save reports a full disk as a RuntimeError, and so does a collective whose peer is gone.
        if isinstance(error, RuntimeError) and free >= self._bytes:
            return error
        reasons = [str(failure) for failure, _ in getattr(error, "failures", {}).values()] or [str(error)]
        return UserError(
            f"{self.directory}: the checkpoint cannot be written ({'; '.join(dict.fromkeys(reasons))}). Its "
            f"tensors need {self._bytes / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free there. Make room "
            "(--save-retain-last keeps fewer checkpoints) or choose another --save. The earlier checkpoints "
            "are complete, and the same command continues from the last one."
        )


def save_checkpoint(
    directory: Path, chunks: Sequence[FusionGPTModel], optimizer: Any, metadata: CheckpointMetadata
) -> Path:
    """Saves one checkpoint outside of a training run, and returns its path."""
    with only_one_run([directory]):
        return CheckpointWriter(directory, chunks, optimizer).save(metadata)


def _bytes_of_all_ranks(state: dict[str, Any]) -> int:
    """Bytes of all tensors of a sharded state, over all ranks, each tensor counted once. One all-reduce."""
    shards = [
        value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)
    ]
    local = sum(
        shard.data.nbytes for shard in shards if shard.data is not None and is_main_replica(shard.replica_id)
    )
    total = torch.tensor([local], device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total.item())


def load_checkpoint(
    path: Path,
    chunks: Sequence[FusionGPTModel],
    optimizer: Any | None,
    architecture: Architecture,
    *,
    verify: bool = True,
) -> CheckpointMetadata:
    """Fills this rank's chunks, and the optimizer unless it is None, from a checkpoint of any layout. All
    ranks call it.

    verify: compare the checksums of all files, even if none of a file's tensors is needed. Raises the same
    UserError on every rank. If a file is missing or cut off, or if the checkpoint holds another model or
    vocabulary, it raises before any tensor is read: Megatron itself would trim or zero-fill embeddings
    without a message.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def opened() -> tuple[CheckpointFiles, CheckpointMetadata, OpenedCheckpoint]:
        files = open_files(path, verify)
        metadata = metadata_in(files)
        refuse_other_model(path, metadata, architecture)
        files.compare_sizes(rank, world_size)
        return files, metadata, open_for_loading(files)

    def filled() -> None:
        with files.comparing_rest(rank, world_size):
            try:
                loaded = megatron_checkpoints.load(_state(chunks, optimizer, loading=True), content)
            except (OSError, CheckpointException, CheckpointingException) as error:
                raise _unreadable(path, error) from error
            for name, chunk in _by_name(chunks).items():
                _load_weights(chunk, loaded[name])
            if optimizer is not None:
                adopt_learning_rates(loaded["optimizer"], optimizer)
                optimizer.load_state_dict(loaded["optimizer"])

    files, metadata, content = _on_all_ranks(opened)
    _on_all_ranks(filled)
    return metadata


def _unreadable(path: Path, error: BaseException) -> UserError:
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()] or [error]
    for failure in failures:
        if isinstance(failure, UserError):
            return failure
    reason = f"{type(failures[0]).__name__}: {str(failures[0])[:200]}"
    return UserError(f"{path} cannot be read ({reason}). Name another checkpoint.")


def _on_all_ranks(action: Callable[[], T]) -> T:
    """The result of this rank's action. If it fails on some ranks, every rank raises the UserError of the
    first of them."""
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure and str(failure))
    if message := next(filter(None, failures), None):
        raise UserError(message) from failure
    return result  # type: ignore[return-value]
