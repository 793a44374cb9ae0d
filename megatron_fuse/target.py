"""The target of a recipe, read and checked without Megatron, before anything is built."""

from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.model.architecture import Architecture, check_layout, read_architecture, shares_sequence
from megatron_fuse.model.config_file import check_model_directory
from megatron_fuse.model.expected_weights import check_weights
from megatron_fuse.model.pipeline_split import stated_split
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.model_parallel import SEQUENCE_MULTIPLE


@dataclass(frozen=True)
class Target:
    """The model that a recipe trains.

    directory: its Hugging Face files. architecture: as its config describes it.
    """

    directory: Path
    architecture: Architecture


def target_directory(recipe: Recipe) -> Path:
    return resolve_model(recipe.target.model, "target.model")


def read_target(recipe: Recipe) -> Target:
    """The target, as its config describes it.

    Raises UserError for a model class, a sequence length or a parallel layout that cannot be trained.
    Training itself would find these only after all other stages. check_target_tokenizer compares the
    tokenizer with the model.
    """
    directory, layout = target_directory(recipe), recipe.parallel
    architecture = read_architecture(directory)
    check_layout(
        architecture,
        **layout.sizes,
        split=stated_split(layout),
        seq_length=recipe.training.seq_length,
    )
    if recipe.training.moe_aux_loss_coeff and architecture.experts is None:
        raise UserError(
            f"--moe-aux-loss-coeff is {recipe.training.moe_aux_loss_coeff}, but the model of "
            f"{architecture.origin} has no experts. Remove the option."
        )
    tensor = layout.tensor_model_parallel_size
    if shares_sequence(architecture, tensor, layout.sequence_parallel) and SEQUENCE_MULTIPLE % tensor:
        raise UserError(
            f"--tensor-model-parallel-size is {tensor}, but the tensor-parallel ranks of a mixture of "
            f"experts share sequences, whose length is a multiple of {SEQUENCE_MULTIPLE}. Choose a size "
            f"of at most {SEQUENCE_MULTIPLE}."
        )
    return Target(directory, architecture)


def check_target_weights(target: Target) -> None:
    """Raises UserError if the target's weight files are damaged, or do not hold the tensors of its config.

    Reads only the headers of the files. Also checks the generation options, because an export copies them.
    """
    check_model_directory(target.directory)
    check_weights(WeightFiles(target.directory), target.architecture)


def check_target_tokenizer(chat: ChatFormat, target: Target) -> None:
    """Raises UserError if the target's tokenizer gives ids that its model does not have.

    chat: the target's format. Without this check, ids within the padding of the vocabulary would train
    without any error.
    """
    architecture = target.architecture
    # A special token, often that for padding, may lie beyond the vocabulary if no conversation holds it.
    used = chat.encode_conversation([{"role": "user", "content": "a"}], "a").ids.tolist()
    largest = max({*range(chat.tokenizer.vocab_size)} - chat.tokenizer.special_ids | {*used})
    if largest >= architecture.vocab_size:
        raise UserError(
            f"target.model: the tokenizer has ids up to {largest}, but vocab_size in {architecture.origin} "
            f"is {architecture.vocab_size}. The tokenizer belongs to another model, or the model was not "
            "resized after tokens were added. Use the tokenizer of the model, or resize the model."
        )
