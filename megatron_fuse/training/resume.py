"""The start of a run: at its last checkpoint, if that checkpoint is of the same run, or at the first step."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.training_options import TrainingOptions
from megatron_fuse.runtime import Runtime
from megatron_fuse.training.checkpoint import load_checkpoint
from megatron_fuse.training.checkpoint_files import LATEST
from megatron_fuse.training.checkpoint_metadata import (
    CheckpointMetadata,
    differences,
    model_identity,
    named_checkpoint,
    read_metadata,
    refuse_other_model,
    versions,
)
from megatron_fuse.training.directories import checkpoint_directory

logger = logging.getLogger(__name__)

# The options of `training` that change the result of a step, without those that only divide its work.
_STEP_OPTIONS = {
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_style",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "clip_grad",
    "moe_aux_loss_coeff",
}


def run_identity(recipe: Recipe, dataset: FusionDataset) -> dict[str, Any]:
    """The properties that a resumed run must share:
    the samples, their order, the loss, and the optimizer step."""
    return {
        "phases": [phase.model_dump(mode="json", by_alias=True) for phase in recipe.phases],
        "global_batch_size": recipe.training.global_batch_size,
        "seed": recipe.training_seed,
        "loss": recipe.loss.model_dump(exclude={"implementation", "fused_linear"})
        | {"student_temperature": recipe.student_temperature},
        "order": recipe.schedule.order,
        "curriculum": dataset.curriculum.sha256 if dataset.curriculum else None,
        "data": dataset.sha256,
        "step": recipe.training.model_dump(include=_STEP_OPTIONS),
    }


def resume(
    recipe: Recipe,
    runtime: Runtime,
    architecture: Architecture,
    chunks: Sequence[FusionGPTModel],
    optimizer: Any,
    run: dict[str, Any],
) -> CheckpointMetadata:
    """Loads the last checkpoint into chunks and optimizer, if there is one.

    Returns the state of the run: its metadata.

    run: run_identity. Raises UserError if the checkpoint is of another run. With --override each difference
    is only a warning; another version of a library is always only a warning. Raises UserError in any case if
    the optimizer's state has another form.
    """
    options, save = recipe.training, checkpoint_directory(recipe)
    start = _before_first_step(recipe, architecture, run)
    path = named_checkpoint(options.load or save)
    if path is None:
        if options.load is not None:
            raise UserError(
                f"--load {options.load}: there is no {LATEST}. Name a directory that --save wrote."
            )
        return start
    stored = read_metadata(path, verify=options.verify)
    other_run = differences(_with_defaults(stored.run), run)
    if other_run and not options.override:
        raise UserError(
            f"{path}: the checkpoint {'; '.join(other_run)}. Restore the old value, start a new run with "
            f"another --save than {save}, or continue with the new value by --override."
        )
    # The model is checked before the optimizer:
    # with another model the optimizer differs too, and the error would mislead.
    refuse_other_model(path, stored, architecture)
    if other_form := differences(stored.optimizer, start.optimizer):
        raise UserError(
            f"{path}: the optimizer {'; '.join(other_form)}, so its state does not fit. Restore the old "
            "value."
        )
    for difference in other_run + differences(stored.versions, start.versions):
        if runtime.is_logging_rank:  # the same on every rank
            logger.warning(f"{path} {difference}")
    load_checkpoint(path, chunks, optimizer, architecture, verify=options.verify)
    logger.info(f"continuing from {path} at iteration {stored.iteration}")
    return replace(
        start,
        iteration=stored.iteration,
        consumed_samples=stored.consumed_samples,
        best_loss=stored.best_loss,
    )


def _before_first_step(recipe: Recipe, architecture: Architecture, run: dict[str, Any]) -> CheckpointMetadata:
    """The state of a run that has done no step."""
    return CheckpointMetadata(
        iteration=0,
        consumed_samples=0,
        model=model_identity(architecture),
        run=run,
        best_loss=None,
        versions=versions(),
        optimizer={
            "use_distributed_optimizer": recipe.parallel.use_distributed_optimizer,
            "precision": recipe.training.precision,
        },
        recipe=recipe.model_dump(mode="json", by_alias=True),
    )


def _with_defaults(run: dict[str, Any]) -> dict[str, Any]:
    """run_identity of a checkpoint. An option that an older version did not have gets today's default, which
    is how it behaved."""
    step = run.get("step")
    defaults = TrainingOptions().model_dump(include=_STEP_OPTIONS)
    return run | {"step": defaults | step} if isinstance(step, dict) else run
