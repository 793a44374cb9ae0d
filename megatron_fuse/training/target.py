"""The target in Megatron: built at this rank's place in the layout, and exported from any checkpoint."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, read_architecture
from megatron_fuse.model.config import transformer_config
from megatron_fuse.model.conversion import load_hugging_face_weights, save_hugging_face_model
from megatron_fuse.model.gpt import FusionLossOptions, build_model_chunks
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import read_json, write_json
from megatron_fuse.target import checkpoint_directory, export_directory, target_directory
from megatron_fuse.training.checkpoint import (
    CheckpointFacts,
    load_checkpoint,
    model_facts,
    named_checkpoint,
    read_facts,
    save_checkpoint,
    versions,
)
from megatron_fuse.training.checkpoint_files import BEST, LATEST


def build_target(recipe: Recipe, architecture: Architecture) -> list[torch.nn.Module]:
    """This rank's model chunks with the Hugging Face weights of recipe.target. Needs a started runtime."""
    layout, training, loss = recipe.parallel, recipe.training, recipe.loss
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = transformer_config(
        architecture,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        transformer_impl=layout.transformer_impl,
        **(recompute if training.recompute else {}),
    )
    options = FusionLossOptions(
        temperature=loss.student_temperature,
        tail=loss.tail,
        implementation=loss.implementation,
        fused_linear=loss.fused_linear,
    )
    chunks = build_model_chunks(architecture, config, seq_length=training.seq_length, loss_options=options)
    load_hugging_face_weights(chunks, target_directory(recipe))
    return chunks


def _whole_model(model_dir: Path) -> tuple[Architecture, list[torch.nn.Module]]:
    """The model of a Hugging Face directory in fp32 on one rank, its parameters unset."""
    architecture = read_architecture(model_dir)
    return architecture, build_model_chunks(architecture, transformer_config(architecture, params_dtype=torch.float32))


def export_checkpoint(checkpoint: Path, reference: Path, output: Path, dtype: str, *, verify: bool = True) -> None:
    """Writes a checkpoint of any layout as a Hugging Face model directory, in one process and on a CPU if need be.

    reference: Hugging Face directory whose config, tokenizer and chat template the model takes over; its weights are not read.
    dtype: fp32, bf16 or fp16. verify: compare the checksums of the checkpoint's files. output must not exist. Needs a runtime
    started with one process.
    """
    architecture, chunks = _whole_model(reference)
    load_checkpoint(checkpoint, chunks, None, architecture, verify=verify)
    save_hugging_face_model(chunks[0], reference, output, dtype)


def export_fused_model(recipe: Recipe) -> tuple[Path, Path]:
    """Exports the recipe's best (or latest) checkpoint; returns the model directory and the checkpoint.

    An earlier export, known by its fusion.json, is replaced if the checkpoint has moved on. Raises UserError where there is no
    checkpoint, or where something else is in the place of the export.
    """
    directory = checkpoint_directory(recipe)
    wanted = BEST if recipe.export.checkpoint == "best" else LATEST
    # Without a held-out split there is no best one.
    checkpoint = named_checkpoint(directory, wanted) or named_checkpoint(directory)
    if checkpoint is None:
        raise UserError(f"{directory} holds no checkpoint: run pretrain_fuse.py first")
    output = export_directory(recipe)
    origin = {"checkpoint": str(checkpoint), "facts": asdict(read_facts(checkpoint)), "dtype": recipe.export.dtype}
    record = output / "fusion.json"
    if output.exists() and not record.exists():
        raise UserError(f"export.path: {output} exists and is no export of ours: move it or choose another directory")
    if output.exists() and read_json(record) == origin:
        return output, checkpoint
    temporary = output.with_name(f".{output.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    export_checkpoint(checkpoint, target_directory(recipe), temporary, recipe.export.dtype)
    if recipe.target.chat_template is not None:
        template = load_format(recipe.target, "target").template
        (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(temporary / record.name, origin)
    if output.exists():
        shutil.rmtree(output)
    temporary.rename(output)
    return output, checkpoint


def import_hugging_face(model_dir: Path, output: Path) -> Path:
    """Writes the weights of a Hugging Face model as checkpoint iteration 0 (fp32, without optimizer), for any layout to load."""
    architecture, chunks = _whole_model(model_dir)
    load_hugging_face_weights(chunks, model_dir)
    facts = CheckpointFacts(
        iteration=0, consumed_samples=0, model=model_facts(architecture), run={}, best_loss=None, versions=versions()
    )
    return save_checkpoint(output, chunks, None, facts)
