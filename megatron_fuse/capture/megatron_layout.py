"""What a source needs for `backend: megatron`, checked without Megatron, before anything is built."""

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.model.architecture import Architecture, check_layout, read_architecture
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import source_options


def source_architecture(recipe: Recipe, source: str) -> Architecture:
    """The architecture of a source that Megatron reads.

    Raises UserError, which names the key and the fix, for a model that Megatron cannot read, and for a
    parallel layout that does not fit the model.
    """
    architecture, layout = readable_source(recipe, source), source_options(recipe, source).parallel
    try:
        check_layout(architecture, **layout.sizes)
    except UserError as error:
        raise UserError(f"sources.{source}.parallel: {error}") from error
    return architecture


def readable_source(recipe: Recipe, source: str) -> Architecture:
    """The architecture of a source that Megatron can read at some layout. Raises UserError otherwise."""
    options = source_options(recipe, source)
    try:
        architecture = read_architecture(resolve_model(options.model, f"sources.{source}.model"))
    except UserError as error:
        raise UserError(
            f"sources.{source}.backend is megatron, but Megatron cannot read this model: {error} Or remove "
            f"sources.{source}.backend: the backend hf reads every model that transformers knows."
        ) from error
    length, longest = recipe.training.seq_length, architecture.longest_rotation
    if longest is not None and length > longest:
        raise UserError(
            f"sources.{source}.backend is megatron and training.seq_length is {length}, but longrope of "
            f"{architecture.origin} has other frequencies in texts of more than {longest} tokens. Set a "
            f"training.seq_length of at most {longest}, or remove sources.{source}.backend."
        )
    return architecture


def check_processes(recipe: Recipe, source: str, processes: int) -> None:
    """Raises UserError if this number of processes does not hold whole copies of a source in capture."""
    copy = source_options(recipe, source).parallel.model_parallel_size
    if processes % copy:
        raise UserError(
            f"sources.{source}.parallel: tensor_model_parallel_size x pipeline_model_parallel_size is "
            f"{copy}, but the number of processes is {processes}. Set --nproc-per-node to a multiple of "
            f"{copy}, or choose smaller sizes."
        )
