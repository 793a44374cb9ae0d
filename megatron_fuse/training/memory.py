"""The memory of a rank, estimated before it is taken, and the options that would lower it.

Weights, gradients, masters and moments are exact. Activations are estimated by a rough formula. Communication
buffers, fragments of the allocator and the memory of CUDA itself come on top.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from fuse_kernels import chunk_rows
from megatron.core import parallel_state

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, shares_sequence
from megatron_fuse.model.families import layer_weights
from megatron_fuse.model.families.weights import outside_layers
from megatron_fuse.model.pipeline_split import layers_of_stages, stated_split
from megatron_fuse.model.weight_blocks import is_of_expert
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.model_parallel import SEQUENCE_MULTIPLE
from megatron_fuse.runtime import Runtime
from megatron_fuse.training.batches import longest_sequence

# Parts of the messages of allocators other than torch's for CUDA: the CPU's, and those of libraries with
# memory of their own.
_ALLOCATORS = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float  # Megatron's buffer, fp32
    masters: float  # fp32 copies of bf16 weights
    moments: float  # both of Adam's, fp32
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def rank_parameters(architecture: Architecture, recipe: Recipe, stage: int) -> int:
    """Parameters of one rank of a pipeline stage, with those of its experts.

    A tied embedding counts on the first stage and again on the last.
    """
    experts = _parameters_of_experts(architecture, recipe, stage)
    return _parameters_without_experts(architecture, recipe, stage) + experts


def _parameters_of_experts(architecture: Architecture, recipe: Recipe, stage: int) -> int:
    layout = recipe.parallel
    layer = sum(
        weight.elements(layout.expert_tensor_size)
        for name, weight in layer_weights(architecture).items()
        if is_of_expert(name)
    )
    return _layers(recipe, architecture, stage) * layer // layout.expert_model_parallel_size


def _parameters_without_experts(architecture: Architecture, recipe: Recipe, stage: int) -> int:
    a, layout = architecture, recipe.parallel
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    outside = outside_layers(a)
    embedding = outside["embedding.word_embeddings.weight"].elements(tensor)
    first, last = stage == 0, stage == stages - 1
    output = last and not (first and a.tied_embeddings)
    layer = sum(
        weight.elements(tensor) for name, weight in layer_weights(a).items() if not is_of_expert(name)
    )
    return _layers(recipe, a, stage) * layer + embedding * (first + output) + a.hidden_size * last


def _layers(recipe: Recipe, architecture: Architecture, stage: int) -> int:
    stages = recipe.parallel.pipeline_model_parallel_size
    return layers_of_stages(architecture.num_layers, stages, stated_split(recipe.parallel))[stage]


def activation_elements(
    architecture: Architecture,
    tensor_model_parallel_size: int,
    *,
    sequence_parallel: bool = False,
    expert_tensor_parallel_size: int = 1,
) -> float:
    """Elements that one layer keeps of one token for its backward pass, on one tensor rank.

    The count follows Korthikanti et al. (arXiv 2205.05198, section 4), for the local layer, without dropout,
    and without scores, which neither torch's attention nor Transformer Engine's keeps.

    Whole on every tensor rank: input, scaled input and output of each norm (split with sequence
    parallelism); cosine and sine of the rotations. Split over the tensor ranks: queries and keys before and
    after the rotation, values, the attention's output; gate and up projection (2), the gate's SiLU and its
    copy, their product. Fused kernels keep fewer of the last group.

    In a mixture the last group counts once for each expert of the token. Each of them also keeps its input
    and its output. Tokens are assumed to be spread evenly over the experts.
    """
    a, tensor = architecture, tensor_model_parallel_size
    heads = a.head_dim * (a.num_attention_heads + a.num_query_groups)
    norms = 2 * (a.norms_before + a.norms_after)
    of_norms = 3 * norms * a.hidden_size / (tensor if sequence_parallel else 1)
    dispatched = 0 if a.experts is None else 2 * a.experts.per_token * a.hidden_size
    of_mlp = 5 * a.ffn_width + expert_tensor_parallel_size * dispatched
    return of_norms + 4 * a.head_dim + (3 * heads + of_mlp) / tensor


def micro_batches_in_flight(stages: int, virtual: int, stage: int) -> float:
    """Forward passes of a rank's layers that wait for their backward pass in Megatron's 1F1B schedules.

    The interleaved schedule starts with 2 (stages - stage - 1) + (virtual - 1) stages forward passes of a
    chunk. A chunk is the `virtual`th part of the rank's layers. One more pass is under way when the first
    backward pass begins.
    """
    if virtual == 1:
        return stages - stage
    return (2 * (stages - stage - 1) + (virtual - 1) * stages + 1) / virtual


def estimate_memory(
    recipe: Recipe, architecture: Architecture, *, sequence: int, data_parallel_size: int, stage: int
) -> Memory:
    """The memory of one rank of a pipeline stage at the peak of the largest step.

    sequence: positions of the longest sequence (batches.longest_sequence). Without packing a micro-batch has
    micro_batch_size sequences, padded to the run's longest document. With packing it has one sequence of up
    to --seq-length positions, most of which belong to documents.
    """
    layout, training = recipe.parallel, recipe.training
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    dense = _parameters_without_experts(architecture, recipe, stage)
    of_experts = _parameters_of_experts(architecture, recipe, stage)
    parameters = dense + of_experts
    bf16 = training.precision == "bf16"
    element = 2 if bf16 else 4
    # With the distributed optimizer each data-parallel rank holds its share of masters and moments.
    of_optimizer: float = parameters
    if layout.use_distributed_optimizer:
        replicas = layout.expert_replicas(data_parallel_size)
        of_optimizer = dense / data_parallel_size + of_experts / replicas
    tokens = training.micro_batch_size * sequence
    layers = _layers(recipe, architecture, stage)
    in_flight = micro_batches_in_flight(stages, layout.virtual_pipeline_model_parallel_size or 1, stage)
    shared = shares_sequence(architecture, tensor, layout.sequence_parallel)
    of_layer = activation_elements(
        architecture,
        tensor,
        sequence_parallel=shared,
        expert_tensor_parallel_size=layout.expert_tensor_size,
    )
    # With recompute every layer keeps its input, and one layer at a time all its activations.
    kept = (
        in_flight * layers * architecture.hidden_size / (tensor if shared else 1) + of_layer
        if training.recompute
        else in_flight * layers * of_layer
    )
    columns = architecture.padded_vocab_size // tensor
    of_logits = min(tokens, chunk_rows(columns, element)) if recipe.loss.fused_linear else tokens
    return Memory(
        weights=element * parameters,
        gradients=4 * parameters,
        masters=4 * of_optimizer if bf16 else 0,
        moments=8 * of_optimizer,
        activations=element * tokens * kept,
        logits=element * of_logits * columns if stage == stages - 1 else 0,
    )


def sequence_of_run(recipe: Recipe, dataset: FusionDataset) -> int:
    """The argument `sequence` of estimate_memory, for all phases of a run."""
    pack_into = recipe.training.seq_length if recipe.training.packing else None
    return longest_sequence(dataset, recipe.phases, pack_into=pack_into)


def readable_size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def savings(
    recipe: Recipe, architecture: Architecture, *, sequence: int, data_parallel_size: int, stage: int
) -> list[tuple[str, float]]:
    """(the option to change, bytes that this saves on a rank of the stage), the largest first, without those
    that save nothing.

    sequence: as for estimate_memory.
    """
    layout, training = recipe.parallel, recipe.training
    turned: dict[str, dict[str, dict[str, Any]]] = {}
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        turned[f"--micro-batch-size {half} (now {training.micro_batch_size})"] = {
            "training": {"micro_batch_size": half}
        }
    if not training.recompute:
        turned["--recompute"] = {"training": {"recompute": True}}
    if not recipe.loss.fused_linear:
        turned["--loss-fused-linear"] = {"loss": {"fused_linear": True}}
    if not layout.use_distributed_optimizer and data_parallel_size > 1:
        turned["--use-distributed-optimizer"] = {"parallel": {"use_distributed_optimizer": True}}
    if architecture.experts is not None:
        more = 2 * layout.expert_model_parallel_size
        # Each doubling halves the replicas of the experts.
        if architecture.experts.count % more == 0 and layout.expert_replicas(data_parallel_size) % 2 == 0:
            now = layout.expert_model_parallel_size
            turned[f"--expert-model-parallel-size {more} (now {now})"] = {
                "parallel": {"expert_model_parallel_size": more}
            }
    twice = 2 * layout.tensor_model_parallel_size
    shares = shares_sequence(architecture, twice, layout.sequence_parallel)
    if architecture.num_query_groups % twice == 0 and not (shares and SEQUENCE_MULTIPLE % twice):
        now = layout.tensor_model_parallel_size
        turned[f"--tensor-model-parallel-size {twice} (now {now})"] = {
            "parallel": {"tensor_model_parallel_size": twice}
        }
    place = {"sequence": sequence, "data_parallel_size": data_parallel_size, "stage": stage}
    now_needed = estimate_memory(recipe, architecture, **place).total
    saved = []
    for words, sections in turned.items():
        changes = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
        other = estimate_memory(recipe.model_copy(update=changes), architecture, **place).total
        saved.append((words, now_needed - other))
    return sorted(((words, size) for words, size in saved if size > 0), key=lambda pair: -pair[1])


@contextmanager
def advise_when_out_of_memory(
    recipe: Recipe, architecture: Architecture, runtime: Runtime, dataset: FusionDataset
) -> Iterator[None]:
    """Turns an error of an allocator into a UserError that names the options to change and the memory that
    each saves."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        stage = parallel_state.get_pipeline_model_parallel_rank()
        place = {
            "sequence": sequence_of_run(recipe, dataset),
            "data_parallel_size": runtime.data_parallel_size,
            "stage": stage,
        }
        needed = estimate_memory(recipe, architecture, **place)
        parts = ", ".join(f"{name} {readable_size(size)}" for name, size in vars(needed).items())
        remedies = [
            f"{words} saves about {readable_size(size)}"
            for words, size in savings(recipe, architecture, **place)
        ]
        raise UserError(
            f"out of memory: {str(error).strip() or type(error).__name__}\n"
            f"A rank of pipeline stage {stage} needs about {readable_size(needed.total)}: {parts}.\n"
            + "\n".join(
                ["Each of these changes saves memory:", *remedies]
                if remedies
                else ["Use a shorter --seq-length or more ranks."]
            )
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed. torch's allocator for CUDA has its own error class,
    the others raise RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)
    )
