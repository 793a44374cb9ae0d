"""The training loop: the optimizer steps of the schedule, with evaluations and checkpoints between them."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.progress import Progress
from megatron_fuse.recipe import MODES, Recipe
from megatron_fuse.runtime import Runtime
from megatron_fuse.training.batches import GlobalBatch, MicroBatch, micro_batches, phase_weights, plan_batch
from megatron_fuse.training.checkpoint import CheckpointWriter
from megatron_fuse.training.checkpoint_files import Retention
from megatron_fuse.training.checkpoint_metadata import CheckpointMetadata
from megatron_fuse.training.data_check import DataCheck
from megatron_fuse.training.directories import checkpoint_directory, metrics_directory
from megatron_fuse.training.guards import StepGuard, check_weights_across_replicas, step_optimizer
from megatron_fuse.training.interruption import Interruption
from megatron_fuse.training.learning_rate import LearningRate, make_learning_rate
from megatron_fuse.training.logging import TrainingLog
from megatron_fuse.training.loss import make_forward_step, reduce_report
from megatron_fuse.training.only_one import only_one_run
from megatron_fuse.training.plan import plan_phases
from megatron_fuse.training.profiling import StepProfiler, check_profile
from megatron_fuse.training.resume import resume, run_identity
from megatron_fuse.training.schedule import Schedule, Step, make_schedule
from megatron_fuse.training.throughput import peak_flops_of_this_gpu, training_flops
from megatron_fuse.training.timing import SAVE, StepTimers
from megatron_fuse.training.wrapping import make_optimizer, wrap_chunks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """The parts of one run that stay the same from step to step. `make_trainer` builds it."""

    recipe: Recipe
    runtime: Runtime
    architecture: Architecture
    chunks: list[FusionGPTModel]  # this rank's model chunks as built, for checkpoints
    wrapped: list[DistributedDataParallel]
    optimizer: Any
    dataset: FusionDataset
    schedule: Schedule
    learning_rate: LearningRate
    run: dict[str, Any]  # run_identity
    timers: StepTimers
    log: TrainingLog
    guard: StepGuard

    @property
    def save_directory(self) -> Path:
        return checkpoint_directory(self.recipe)


def make_trainer(
    recipe: Recipe,
    runtime: Runtime,
    architecture: Architecture,
    chunks: list[FusionGPTModel],
    dataset: FusionDataset,
) -> Trainer:
    """Wraps the model chunks (weights loaded) for data parallelism, mixed precision and optimization by
    Megatron-core.
    """
    options = recipe.training
    modules, wrapped = wrap_chunks(recipe, chunks)
    optimizer = make_optimizer(recipe, wrapped)
    curriculum = dataset.curriculum
    schedule = make_schedule(
        recipe, len(dataset.train), ranks=curriculum.ranks[dataset.train] if curriculum else None
    )
    learning_rate = make_learning_rate(options, schedule.total_steps)
    run = run_identity(recipe, dataset)
    check_profile(recipe, ranks=runtime.world_size, last_step=schedule.last_step(options.train_iters))
    timers = StepTimers(options.timing_log_level, chunks[0].config)
    log = TrainingLog(
        recipe,
        plan_phases(schedule, dataset, architecture),
        timers,
        ranks=runtime.world_size,
        peak_flops=peak_flops_of_this_gpu() if options.precision == "bf16" else None,
        active=runtime.is_logging_rank,
    )
    guard = StepGuard(options.max_skipped_iterations, options.check_for_spiky_loss)
    return Trainer(
        recipe,
        runtime,
        architecture,
        modules,
        wrapped,
        optimizer,
        dataset,
        schedule,
        learning_rate,
        run,
        timers,
        log,
        guard,
    )


def train(trainer: Trainer) -> None:
    """Runs the schedule from the last checkpoint, or from its start.

    It ends at the end of the schedule, at --train-iters, or early if interruption.py says so. Raises
    UserError, on every rank, if another process trains into the same directories. After a Ctrl-C it saves and
    then raises KeyboardInterrupt.
    """
    with only_one_run([trainer.save_directory, metrics_directory(trainer.recipe)]):
        _run(trainer)


def _run(trainer: Trainer) -> None:
    options = trainer.recipe.training
    metadata = resume(
        trainer.recipe, trainer.runtime, trainer.architecture, trainer.chunks, trainer.optimizer, trainer.run
    )
    last_step = trainer.schedule.last_step(options.train_iters)
    checkpoints = CheckpointWriter(
        trainer.save_directory,
        trainer.chunks,
        trainer.optimizer,
        retention=Retention(options.save_retain_last, options.save_retain_interval),
        asynchronous=options.async_save,
    )
    stop, first, tokens = None, metadata.iteration, 0
    trainer.log.start(metadata.iteration)
    with (
        Progress("training", "steps", last_step, already=first) as progress,
        StepProfiler(trainer.recipe, trainer.runtime, done=metadata.iteration) as profiler,
        DataCheck(trainer.dataset.artifacts if options.verify else []) as data_check,
        Interruption(
            signals=options.exit_signal_handler,
            interval=options.exit_interval,
            minutes=options.exit_duration_in_mins,
            device=trainer.runtime.device,
            data_check=data_check,
        ) as interruption,
    ):
        if metadata.iteration == 0:
            _evaluate(trainer, metadata.iteration)
        while metadata.iteration < last_step and not stop:
            profiler.begin_step()
            step = trainer.schedule.step(metadata.consumed_samples)
            assert step is not None
            batch, values = _run_step(trainer, step)
            metadata = replace(metadata, iteration=step.iteration + 1, consumed_samples=step.consumed_samples)
            tokens += batch.tokens
            progress.update(metadata.iteration - first, tokens)
            _guard(trainer, step, values)

            last = metadata.iteration == last_step
            pause = step.ends_phase or last
            stop = None if last else interruption.reason(metadata.iteration)
            # A run that must stop has little time left: it skips an evaluation that is due, and saves.
            evaluates = not stop and (pause or _is_due(metadata.iteration, options.eval_interval))
            loss = _evaluate(trainer, metadata.iteration) if evaluates else None
            improved = loss is not None and _is_better(loss, metadata.best_loss)
            metadata = replace(metadata, best_loss=loss) if improved else metadata
            checkpoints.publish_finished()
            if pause or improved or stop or _is_due(metadata.iteration, options.save_interval):
                data_check.finish()
                _save(trainer, checkpoints, metadata, best=improved)
        checkpoints.finish()
    trainer.log.close()
    if stop:
        logger.info(
            f"stopped after iteration {metadata.iteration} of {last_step} ({stop}), saved in "
            f"{trainer.save_directory}: the same command continues from there"
        )
    if interruption.is_interrupt:
        raise KeyboardInterrupt


def _run_step(trainer: Trainer, step: Step) -> tuple[GlobalBatch, dict[str, float]]:
    """Plans, runs and logs one step of the schedule. Returns its plan and the values of train_step."""
    lr = trainer.learning_rate.at(step.iteration)
    weights = phase_weights(step.phase, progress=step.progress, kl_factor=_kl_factor(trainer.recipe))
    with trainer.timers("batch-generator"):
        batch = plan_step(trainer, trainer.dataset.train[step.examples], weights)
    values = train_step(trainer, batch, lr)
    flops = training_flops(trainer.architecture, batch.positions)
    trainer.log.step(
        step.iteration + 1, step.consumed_samples, step.phase.name, lr, values, batch.tokens, flops
    )
    return batch, values


def _is_better(loss: float, best: float | None) -> bool:
    """Whether a loss is lower than the best one so far, None if there is none. NaN never is."""
    return loss < (math.inf if best is None else best)


def _save(
    trainer: Trainer, checkpoints: CheckpointWriter, metadata: CheckpointMetadata, *, best: bool
) -> None:
    gather_weights(trainer)
    with trainer.timers(SAVE):
        checkpoints.save(metadata, best=best)
    trainer.log.saved(metadata.iteration)


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _kl_factor(recipe: Recipe) -> float:
    return recipe.student_temperature**2 if recipe.loss.temperature_squared else 1.0


def plan_step(trainer: Trainer, examples: np.ndarray, weights: dict[str, tuple[float, float]]) -> GlobalBatch:
    """The plan of a step of these examples, at the recipe's layout. weights: see plan_batch."""
    runtime, options = trainer.runtime, trainer.recipe.training
    return plan_batch(
        trainer.dataset,
        examples,
        weights,
        micro_batch_size=options.micro_batch_size,
        data_parallel_size=runtime.data_parallel_size,
        micro_batch_multiple=runtime.pipeline_model_parallel_size
        if runtime.virtual_pipeline_model_parallel_size
        else 1,
        pack_into=options.seq_length if options.packing else None,
    )


def forward_backward(
    trainer: Trainer, batch: GlobalBatch, *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """All micro-batches of a step through Megatron's schedule: what the forward steps report
    (loss.make_forward_step) of each.

    Waits for the GPU at no point.
    """
    runtime = trainer.runtime

    def micro_batch_iterator() -> Iterator[MicroBatch]:
        return micro_batches(
            trainer.dataset,
            batch,
            data_parallel_rank=runtime.data_parallel_rank,
            data_parallel_size=runtime.data_parallel_size,
            with_targets=runtime.is_last_stage,
            device=runtime.device,
        )

    # Each virtual pipeline chunk reads the same micro-batches, with an iterator of its own.
    iterators = [trainer.timers.each("batch-generator", micro_batch_iterator()) for _ in trainer.wrapped]
    return get_forward_backward_func()(
        forward_step_func=make_forward_step(
            micro_batches=batch.micro_batches, sources=len(trainer.dataset.sources)
        ),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=trainer.wrapped if len(trainer.wrapped) > 1 else trainer.wrapped[0],
        num_microbatches=batch.micro_batches,
        seq_length=batch.seq_length,
        micro_batch_size=batch.micro_batch_size,
        forward_only=forward_only,
    )


def train_step(trainer: Trainer, batch: GlobalBatch, lr: float) -> dict[str, float]:
    """One optimizer step. It is skipped if the gradient is not finite.

    Returns the gradient norm and the share of padding on every rank; on ranks of the last stage also the
    means of reduce_report.
    """
    for chunk in trainer.wrapped:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    reports = forward_backward(trainer, batch, forward_only=False)
    with trainer.timers("optimizer"):
        grad_norm = step_optimizer(trainer.optimizer, trainer.recipe.training.clip_grad)
    # The losses exist on the last pipeline stage only.
    values = {}
    if trainer.runtime.is_last_stage:
        values = reduce_report(reports, batch.supervised_tokens, batch.taught, trainer.dataset.sources)
    return values | {"grad norm": grad_norm, "padding": batch.padding}


def gather_weights(trainer: Trainer) -> None:
    """Brings every weight of this rank up to date.

    Code that reads weights without a forward pass must call it first.

    With overlap_param_gather a step updates only this rank's share of the weights. Megatron's pre-hooks
    gather the other shares when a module is about to run, as in an evaluation. After this function they have
    nothing left to gather until the next step. Collectives: with overlap_param_gather one all-gather per
    bucket over the data-parallel group, else none.
    """
    if trainer.recipe.parallel.overlap_param_gather:
        for chunk in trainer.wrapped:
            chunk.start_param_sync(force_sync=True)


def _guard(trainer: Trainer, step: Step, values: dict[str, float]) -> None:
    """Prints the warnings about a finished step.

    Raises UserError, on every rank, if the run should not continue.
    """
    iteration, options = step.iteration + 1, trainer.recipe.training
    ids = partial(_example_ids, trainer.dataset, step)
    warning = trainer.guard.watch(iteration, step.phase.name, values, ids)
    if warning and trainer.runtime.is_logging_rank:  # the others have the same warning
        logger.warning(warning)
    if _is_due(iteration, options.check_weight_hash_across_dp_replicas_interval):
        gather_weights(trainer)
        check_weights_across_replicas(trainer.chunks, iteration)
        trainer.log.restart_clock()


def _example_ids(dataset: FusionDataset, step: Step) -> list[str]:
    return [dataset.example_ids[example] for example in dataset.train[step.examples]]


def _evaluate(trainer: Trainer, iteration: int) -> float | None:
    """Logs CE, KL and FIT of both modes on the validation examples.

    Returns the training mode's CE in nats per token, the same on every rank;
    None if no validation example has one.
    """
    dataset, recipe = trainer.dataset, trainer.recipe
    if len(dataset.validation) == 0:
        return None
    taught = recipe.modes_with_teacher
    weights = {mode: (1.0, float(mode in taught)) for mode in MODES if mode == "training" or mode in taught}
    reports: list[dict[str, torch.Tensor]] = []
    counts = dict.fromkeys(weights, 0)
    for chunk in trainer.wrapped:
        chunk.eval()
    size = recipe.training.global_batch_size
    for first in range(0, len(dataset.validation), size):
        batch = plan_step(trainer, dataset.validation[first : first + size], weights)
        reports += forward_backward(trainer, batch, forward_only=True)
        for mode, tokens in batch.supervised_tokens.items():
            counts[mode] += tokens
    for chunk in trainer.wrapped:
        chunk.train()
    means = reduce_report(reports, counts, taught, dataset.sources) if trainer.runtime.is_last_stage else {}
    # Without `loss`: the losses of the batches have different denominators, so that their sum means nothing.
    means = {name: means[name] for name in sorted(means.keys() - {"loss"})}
    means |= {
        f"perplexity/{mode}": math.exp(min(means[f"ce/{mode}"], 700.0))
        for mode in MODES
        if f"ce/{mode}" in means
    }
    trainer.log.evaluation(iteration, means, len(dataset.validation))
    return _from_last_stage(trainer, means.get("ce/training", math.nan)) if counts["training"] else None


def _from_last_stage(trainer: Trainer, value: float) -> float:
    """The last pipeline stage's value, on every rank:
    all ranks must agree whether a checkpoint is the best. One broadcast."""
    shared = torch.tensor([value], dtype=torch.float64, device=trainer.runtime.device)
    dist.broadcast(
        shared,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return shared.item()
