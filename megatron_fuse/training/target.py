"""The target in Megatron: this rank's part of it for training, and the whole model from any checkpoint."""

from pathlib import Path

import torch

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, read_architecture
from megatron_fuse.model.config import transformer_config
from megatron_fuse.model.config_file import read_model_config
from megatron_fuse.model.conversion import load_hugging_face_weights, save_hugging_face_model
from megatron_fuse.model.expected_weights import hugging_face_shapes
from megatron_fuse.model.gpt import FusionGPTModel, FusionLossOptions, build_model_chunks
from megatron_fuse.model.weight_files import DTYPES, WeightFiles, common_dtype
from megatron_fuse.recipe import Recipe
from megatron_fuse.target import check_target_weights, target_directory
from megatron_fuse.training.checkpoint import load_checkpoint, save_checkpoint
from megatron_fuse.training.checkpoint_files import checkpoints_in
from megatron_fuse.training.checkpoint_metadata import CheckpointMetadata, model_identity, versions


def build_target(recipe: Recipe, architecture: Architecture) -> list[FusionGPTModel]:
    """This rank's model chunks with the Hugging Face weights of recipe.target. Needs a started runtime."""
    check_target_weights(recipe, architecture)  # before memory is taken for them
    chunks = build_chunks(recipe, architecture)
    load_hugging_face_weights(chunks, target_directory(recipe))
    return chunks


def build_chunks(
    recipe: Recipe, architecture: Architecture, *, perform_initialization: bool = False
) -> list[FusionGPTModel]:
    """This rank's model chunks in the layout of the recipe.

    Their weights are unset, or random with perform_initialization.

    Raises UserError if Transformer Engine would have to attend to packed sequences in fp32.
    """
    layout, training, loss = recipe.parallel, recipe.training, recipe.loss
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = transformer_config(
        architecture,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        sequence_parallel=layout.sequence_parallel,
        transformer_impl=layout.transformer_impl,
        deterministic_mode=training.deterministic,
        perform_initialization=perform_initialization,
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


def dtype_of_reference(reference: Path) -> str:
    """fp32, bf16 or fp16: the dtype of the weights in a Hugging Face directory,
    else that of its config, else fp32."""
    try:
        weights = WeightFiles(reference)
        dtype_name = common_dtype(
            weights.dtype(name) for name in hugging_face_shapes(read_architecture(reference))
        )
    except UserError:  # a directory without weights: its config is enough
        stated = read_model_config(reference)
        dtype_name = next(
            (
                name
                for name, dtype in DTYPES.items()
                if str(dtype) == f"torch.{stated.dtype or stated.torch_dtype}"
            ),
            "",
        )
    return dtype_name if dtype_name in DTYPES else "fp32"


def export_checkpoint(
    checkpoint: Path, reference: Path, output: Path, dtype: str | None = None, *, verify: bool = True
) -> str:
    """Writes a checkpoint of any layout as a Hugging Face model directory, in one process, also on a CPU.
    Returns the dtype.

    reference: Hugging Face directory that gives config, tokenizer and chat template; its weights are not
        read.
    dtype: fp32, bf16 or fp16; None: the reference's.
    verify: compare the checksums of the checkpoint's files.

    output must not exist. Needs a runtime started with one process.
    """
    dtype = dtype or dtype_of_reference(reference)
    save_hugging_face_model(load_whole_model(checkpoint, reference, verify=verify), reference, output, dtype)
    return dtype


def load_whole_model(checkpoint: Path, reference: Path, *, verify: bool) -> torch.nn.Module:
    """The model of a checkpoint of any layout, in fp32 in one process. reference, verify: see
    export_checkpoint.
    """
    architecture, chunks = _whole_model(reference)
    load_checkpoint(checkpoint, chunks, None, architecture, verify=verify)
    return chunks[0]


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
