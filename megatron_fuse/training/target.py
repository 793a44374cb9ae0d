"""The target in Megatron: this rank's part of it for training, and a checkpoint of its first weights."""

from pathlib import Path
from typing import Any

import torch

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, read_architecture
from megatron_fuse.model.config import transformer_config
from megatron_fuse.model.conversion import load_hugging_face_weights
from megatron_fuse.model.gpt import FusionGPTModel, FusionLossOptions, build_model_chunks
from megatron_fuse.model.pipeline_split import stated_split
from megatron_fuse.recipe import Recipe
from megatron_fuse.target import Target, check_target_weights
from megatron_fuse.training.checkpoint import save_checkpoint
from megatron_fuse.training.checkpoint_files import checkpoints_in
from megatron_fuse.training.checkpoint_metadata import CheckpointMetadata, model_identity, versions


def build_target(recipe: Recipe, target: Target) -> list[FusionGPTModel]:
    """This rank's model chunks with the Hugging Face weights of recipe.target. Needs a started runtime."""
    check_target_weights(target)  # before memory is taken for them
    chunks = build_chunks(recipe, target.architecture)
    load_hugging_face_weights(chunks, target.directory)
    return chunks


def build_chunks(
    recipe: Recipe, architecture: Architecture, *, perform_initialization: bool = False
) -> list[FusionGPTModel]:
    """This rank's model chunks in the layout of the recipe.

    Their weights are unset, or random with perform_initialization.

    Raises UserError if Transformer Engine would have to attend to packed sequences in fp32.
    """
    layout, training, loss = recipe.parallel, recipe.training, recipe.loss
    recompute: dict[str, Any] = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    config = transformer_config(
        architecture,
        **layout.sizes,
        split=stated_split(layout),
        params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        sequence_parallel=layout.sequence_parallel,
        transformer_impl=layout.transformer_impl,
        deterministic_mode=training.deterministic,
        perform_initialization=perform_initialization,
        moe_aux_loss_coeff=training.moe_aux_loss_coeff,
        **(recompute if training.recompute else {}),
    )
    if config.transformer_impl == "transformer_engine" and training.packing and training.precision == "fp32":
        raise UserError(
            "training.packing: Transformer Engine's attention supports packed sequences only in bf16. Set "
            "training.precision to bf16, or parallel.transformer_impl to local."
        )
    options = FusionLossOptions(
        temperature=recipe.student_temperature,
        tail=loss.tail,
        implementation=loss.implementation,
        fused_linear=loss.fused_linear,
    )
    return build_model_chunks(architecture, config, seq_length=training.seq_length, loss_options=options)


def _whole_model(model_dir: Path) -> tuple[Architecture, list[FusionGPTModel]]:
    """The model of a Hugging Face directory in fp32 on one rank. Its parameters are unset."""
    architecture = read_architecture(model_dir)
    return architecture, build_model_chunks(
        architecture, transformer_config(architecture, params_dtype=torch.float32)
    )


def import_hugging_face(model_dir: Path, output: Path) -> Path:
    """Writes the weights of a Hugging Face model as checkpoint iteration 0 (fp32, without optimizer), which
    loads at any layout.

    Returns the checkpoint. Raises UserError if `output` already holds checkpoints: a run that continues there
    would start again from these weights.
    """
    if existing := checkpoints_in(output):
        raise UserError(
            f"{output} already holds checkpoints ({existing[max(existing)].name}). Choose another directory."
        )
    architecture, chunks = _whole_model(model_dir)
    load_hugging_face_weights(chunks, model_dir)
    metadata = CheckpointMetadata(
        iteration=0,
        consumed_samples=0,
        model=model_identity(architecture),
        run={},
        best_loss=None,
        versions=versions(),
    )
    return save_checkpoint(output, chunks, None, metadata)
