"""The lines of the banner that describe the run; runtime/distributed.py adds those about the machine."""

from collections.abc import Sequence

import torch
from fuse_kernels.arguments import Student, choose_implementation

from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.gpt import FusionGPTModel
from megatron_fuse.recipe import Recipe
from megatron_fuse.runtime import fused_adam_library


def describe_run(
    recipe: Recipe, architecture: Architecture, chunks: Sequence[FusionGPTModel], *, entries_per_row: int
) -> list[str]:
    """The lines about the run, with the real choice for every "auto" of the recipe.

    chunks: this rank's model chunks, as built.
    entries_per_row: of the fusion data.
    """
    training, layout = recipe.training, recipe.parallel
    config = chunks[0].config
    attention = type(chunks[0].decoder.layers[0].self_attention.core_attention).__name__
    masters = "with fp32 masters" if training.precision == "bf16" else "throughout"
    of_optimizer = [
        "sharded over data-parallel ranks"
        if layout.use_distributed_optimizer
        else "whole on every data-parallel rank",
        *(["gradients reduced during the backward pass"] if layout.overlap_grad_reduce else []),
        *(["weights gathered during the forward pass"] if layout.overlap_param_gather else []),
    ]
    how = "with the output layer, in chunks" if recipe.loss.fused_linear else "over whole logits"
    return [
        f"target: {architecture.family}, {architecture.num_layers} layers, hidden "
        f"{architecture.hidden_size}, "
        f"vocabulary {architecture.vocab_size} padded to {architecture.padded_vocab_size}",
        f"layers: {config.transformer_impl}   attention: {attention}   precision: {training.precision} "
        f"{masters}   recompute: {_yes(training.recompute)}",
        f"optimizer: {fused_adam_library() or 'torch'} Adam, {', '.join(of_optimizer)}",
        f"loss: {_loss_implementation(recipe, architecture, entries_per_row)}, {how}   tail: "
        f"{recipe.loss.tail}   temperature: {recipe.student_temperature:g}",
        f"sequences: {training.seq_length} tokens, {'packed' if training.packing else 'padded'}, "
        f"{training.micro_batch_size} a micro-batch, {training.global_batch_size} examples a step",
    ]


def _loss_implementation(recipe: Recipe, architecture: Architecture, entries_per_row: int) -> str:
    """The implementation that the kernels will choose on this rank's device."""
    student = Student(
        name="logits",
        rows=recipe.training.micro_batch_size * recipe.training.seq_length,
        columns=architecture.padded_vocab_size // recipe.parallel.tensor_model_parallel_size,
        dtype=torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    return choose_implementation(recipe.loss.implementation, student, max(entries_per_row, 1))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
