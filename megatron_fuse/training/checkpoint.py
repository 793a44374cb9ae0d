"""Checkpoints through Megatron's dist_checkpointing: whole or absent, and loadable at any tensor, pipeline and data layout.

    DIRECTORY/iter_0000120/                       sharded model and optimizer, facts.json, and checksums.json of all files
    DIRECTORY/latest_checkpointed_iteration.txt   as Megatron-LM names it; written last
    DIRECTORY/best_checkpointed_iteration.txt     the checkpoint with the least held-out cross-entropy

Training draws no random number after the weights are there (the order of samples is a function of the seed, dropout is 0), so
consumed samples, model and optimizer are the whole state.

The files of all ranks go into a hidden directory; once they are on disk it gets the checkpoint's name, then `best` and at last
`latest` name it, and only then does an old checkpoint go. Asynchronously, a process forked from each rank writes what the rank
held at that moment while training goes on: of a GPU's tensors a copy is made first, of a CPU's the fork itself is the copy.
"""

import importlib.metadata
import multiprocessing.util
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.transformer.module import Float16Module
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.processes import end_with_pool
from megatron_fuse.runtime.megatron_versions import adopt_learning_rates
from megatron_fuse.storage import write_json
from megatron_fuse.storage.strict_json import parse_object
from megatron_fuse.training import megatron_checkpoints
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
from megatron_fuse.training.interruption import signals_held
from megatron_fuse.training.only_one import only_one_run
from megatron_fuse.training.write_results import use_new_write_results

T = TypeVar("T")
# The only form of the distributed optimizer's state that loads at every layout; the older default raises on saving.
_OPTIMIZER_FORM = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered over gloo, bucket by bucket, into the memory of the first data-parallel rank's host: 12 bytes a parameter of its
    # tensor and pipeline rank, and one bucket. Otherwise every rank would gather the same on its GPU and its host.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
# What Transformer Engine's layers add to the state of a model: scales of fp8, which is not used here. Without it a checkpoint loads
# into layers of either implementation.
_EXTRA_STATE = "_extra_state"
# What of the architecture decides whether weights fit. The padded vocabulary alone would not: 1003 and 1024 both pad to 1024.
_MODEL_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "padded_vocab_size",
    "qkv_bias",
    "tied_embeddings",
)


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says of itself in facts.json, readable without Megatron."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    iteration: Annotated[int, Field(ge=0, strict=True)]  # steps done
    consumed_samples: Annotated[int, Field(ge=0, strict=True)]
    model: dict[str, Any]  # sizes of the architecture
    run: dict[str, Any]  # what a resumed run must have in common: phases, batch size, seed, loss, order, data hash
    best_loss: Annotated[float, Field(strict=True)] | None  # least held-out cross-entropy so far, nats per token
    versions: dict[str, str]
    optimizer: dict[str, Any] = field(default_factory=dict)  # the form of its state; empty where there is none
    recipe: dict[str, Any] = field(default_factory=dict)  # as it was, for the reader; empty where weights were imported


def model_facts(architecture: Architecture) -> dict[str, Any]:
    return {key: getattr(architecture, key) for key in _MODEL_KEYS}


def versions() -> dict[str, str]:
    return {name: _version(name) for name in ("megatron-fuse", "torch", "megatron-core")}


def _version(package: str) -> str:
    """Of what is run from its source tree nothing is installed that would have a version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def named_checkpoint(directory: Path, which: str = LATEST) -> Path | None:
    """The checkpoint that LATEST or BEST names, None where there is none."""
    iteration = _named_iteration(directory, which)
    if iteration is None:
        return None
    path = iteration_directory(directory, iteration)
    if not (path / "facts.json").exists():
        raise UserError(
            f"{directory / which} names iteration {iteration}, but {path} is missing or incomplete: name another one there"
        )
    return path


def _named_iteration(directory: Path, which: str) -> int | None:
    tracker = directory / which
    if not tracker.exists():
        return None
    try:
        content = tracker.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{tracker}: cannot be read ({error.strerror})") from error
    if not re.fullmatch(rb"[0-9]{1,12}", content):
        raise UserError(
            f"{tracker}: holds {content[:40]!r}, expected an iteration number: write that of a checkpoint in {directory} there"
        )
    return int(content)


def iteration_directory(directory: Path, iteration: int) -> Path:
    return directory / f"iter_{iteration:07d}"


def read_facts(path: Path, *, verify: bool = True) -> CheckpointMetadata:
    """What facts.json says. verify: compare its checksum. Raises UserError where it is not there or not of this version."""
    return _facts_in(_open_files(path, verify))


def _open_files(path: Path, verify: bool) -> CheckpointFiles:
    if not (path / "facts.json").exists():
        raise UserError(
            f"{path}: no facts.json, so not a whole checkpoint: name a directory iter_XXXXXXX of a finished save"
        )
    return CheckpointFiles(path, verify=verify)


def _facts_in(files: CheckpointFiles) -> CheckpointMetadata:
    path = files.path
    place = path / "facts.json"
    content = parse_object(files.content(place.name), str(place))
    try:
        facts = TypeAdapter(CheckpointMetadata).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(str(part) for part in first['loc'])[:100]}: {first['msg']}"
        raise UserError(f"{place}: not a checkpoint of this version ({what}): name another checkpoint") from error
    if re.fullmatch(r"iter_[0-9]+", path.name) and int(path.name.removeprefix("iter_")) != facts.iteration:
        raise UserError(
            f"{path} holds the checkpoint of iteration {facts.iteration}, by its facts.json: give it its name back"
        )
    return facts


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Every key in which what a checkpoint says differs from what this run says, with both values; of two mappings their differences."""
    said = []
    for key, value in wanted.items():
        other = found.get(key)
        if other == value:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            same = {name for name in value if name in other and other[name] == value[name]}
            other, value = ({name: of[name] for name in of if name not in same} for of in (other, value))
        said.append(f"has {key} = {other!r}, this run has {key} = {value!r}")
    return said


def refuse_other_model(path: Path, facts: CheckpointMetadata, architecture: Architecture) -> None:
    """Raises UserError where a checkpoint holds another model or vocabulary."""
    if differing := differences(facts.model, model_facts(architecture)):
        raise UserError(f"{path}: checkpoint {'; '.join(differing)}: load it into the model that it was made from")


def _by_name(chunks: Sequence[FusionGPTModel]) -> dict[str, FusionGPTModel]:
    """Model chunks under the names that Megatron-LM gives them in a checkpoint."""
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _state(chunks: Sequence[FusionGPTModel], optimizer: Any | None, *, loading: bool) -> dict[str, Any]:
    state = {name: _without_extra_state(chunk.sharded_state_dict()) for name, chunk in _by_name(chunks).items()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=_OPTIMIZER_FORM)
    return state


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith(_EXTRA_STATE)}


def _load_weights(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Raises RuntimeError, as load_state_dict does, if a weight is missing or unknown."""
    model = chunk.module if isinstance(chunk, Float16Module) else chunk  # which does not say what is missing
    missing, unknown = model.load_state_dict(state, strict=False)
    if wrong := [key for key in (*missing, *unknown) if not key.endswith(_EXTRA_STATE)]:
        raise RuntimeError(f"the model and its checkpoint do not have the same weights: {', '.join(wrong[:5])}")


class CheckpointWriter:
    """Saves the checkpoints of one run, and removes what a run that was killed left unfinished. All ranks call every method.

    chunks: this rank's model chunks before data parallelism wraps them. optimizer: None for weights alone.
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
        # Writers are forked by multiprocessing: none of them outlives this process.
        multiprocessing.util.register_after_fork(self, lambda _: end_with_pool())
        if dist.get_rank() == 0:
            remove_leftovers(directory)

    def save(self, facts: CheckpointMetadata, *, best: bool = False) -> Path:
        """Writes a checkpoint; asynchronously it is there after publish_finished or finish. best: `best` is to name it.

        Raises UserError where it cannot be written, on the rank or ranks that know why; the checkpoints before are untouched.
        """
        self.finish()
        final = iteration_directory(self.directory, facts.iteration)
        state = _state(self.chunks, self.optimizer, loading=False)
        self._bytes = _bytes_of_all_ranks(state)
        temporary = self._on_rank_zero(lambda: self._begin(final))
        use_new_write_results()
        with signals_held():
            try:
                request, written = megatron_checkpoints.request_save(state, temporary)
                request.add_finalize_fn(
                    lambda: self._on_rank_zero(lambda: self._publish(temporary, written, facts, best))
                )
                if self.asynchronous:
                    self._queue.schedule_async_request(request)
                else:
                    request.execute_sync()
            except (OSError, RuntimeError, CheckpointException) as error:
                raise self._explained(error) from error
        return final

    def publish_finished(self) -> None:
        """Between two steps: publishes an asynchronous save that all ranks have written. Costs nothing where none is under way."""
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

    def _publish(self, temporary: Path, written: dict[str, StoredItems], facts: CheckpointMetadata, best: bool) -> None:
        write_json(temporary / "facts.json", asdict(facts))
        write_checksums(temporary, written)
        trackers = [self.directory / which for which in ([BEST, LATEST] if best else [LATEST])]
        publish(temporary, iteration_directory(self.directory, facts.iteration), trackers)
        checkpoints = checkpoints_in(self.directory)
        named = {_named_iteration(self.directory, which) for which in (BEST, LATEST)}
        for iteration in self.retention.expired(checkpoints, facts.iteration, named):
            remove_checkpoint(checkpoints[iteration])

    def _on_rank_zero(self, action: Callable[[], T]) -> T:
        """What rank 0's action returns, on every rank; where it fails, every rank raises the same UserError."""
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
        """The UserError for a save that failed, its files removed; the error itself where it is about something else."""
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
            f"{self.directory}: the checkpoint cannot be written ({'; '.join(dict.fromkeys(reasons))}): its tensors "
            f"take {self._bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free there; make room (--save-retain-last keeps fewer) or "
            "choose another --save. The checkpoints before are whole, and the same command continues from the last"
        )


def save_checkpoint(
    directory: Path, chunks: Sequence[FusionGPTModel], optimizer: Any, facts: CheckpointMetadata
) -> Path:
    """One checkpoint and no other."""
    with only_one_run([directory]):
        return CheckpointWriter(directory, chunks, optimizer).save(facts)


def _bytes_of_all_ranks(state: dict[str, Any]) -> int:
    """Of the tensors of a sharded state, each counted once. One all-reduce."""
    shards = [value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)]
    mine = sum(shard.data.nbytes for shard in shards if shard.data is not None and is_main_replica(shard.replica_id))
    total = torch.tensor([mine], device=torch.cuda.current_device())
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
    """Fills this rank's chunks, and the optimizer unless None, from a checkpoint written at any layout. All ranks call it.

    verify: compare the checksums of all files, also of those whose tensors are not asked for. Raises the same UserError on every
    rank, before any tensor is read if a file is missing or cut off or the checkpoint holds another model or vocabulary: Megatron
    itself would trim or zero-fill embeddings without a word.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def opened() -> tuple[CheckpointFiles, CheckpointMetadata, megatron_checkpoints.OpenedCheckpoint]:
        files = _open_files(path, verify)
        facts = _facts_in(files)
        refuse_other_model(path, facts, architecture)
        files.compare_sizes(rank, world_size)
        return files, facts, megatron_checkpoints.open_for_loading(files)

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

    files, facts, content = _on_all_ranks(opened)
    _on_all_ranks(filled)
    return facts


def _unreadable(path: Path, error: BaseException) -> UserError:
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()] or [error]
    for failure in failures:
        if isinstance(failure, UserError):
            return failure
    reason = f"{type(failures[0]).__name__}: {str(failures[0])[:200]}"
    return UserError(f"{path} cannot be read ({reason}): name another checkpoint")


def _on_all_ranks(action: Callable[[], T]) -> T:
    """What a rank's action returns; where it fails on some, every rank raises the UserError of the first of them."""
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
