"""The memory of one GPU in each kind of work: reading, answering and training.

The formulas for reading and answering follow the code that does it (capture/reading.py,
sources/generation.py). A training's memory is that of `--dry-run` (training/memory.py) and what comes on top.
"""

from dataclasses import asdict, dataclass, field

from fuse_kernels import chunk_rows

from megatron_fuse.model.architecture import Architecture
from megatron_fuse.planning.sizes import BYTES, ModelSize
from megatron_fuse.recipe import Recipe
from megatron_fuse.training.memory import estimate_memory

# CUDA's own memory in each process, with cuBLAS's workspaces, and NCCL's buffers.
CONTEXT = 1.5e9
# The allocator's blocks do not fit together without gaps: this share of a GPU stays unused.
FRAGMENTS = 0.05
# vLLM and SGLang take 0.9 of a GPU by default. What weights leave of it holds keys and values.
SERVER_SHARE = 0.9
# Bytes of a logit while a token is sampled: fp32 logits, their softmax, its fp64 sums twice; with top_p also
# the sorted copies.
_SAMPLED_BYTES = 4 + 4 + 8 + 8
_SORTED_BYTES = 4 + 8 + 4 + 4


@dataclass(frozen=True)
class Need:
    """Bytes of one GPU at the peak of a work, by what they are for."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def fits(self, memory: float, share: float = 1 - FRAGMENTS) -> bool:
        """Whether a GPU with this much memory has it. share: of the memory that can be used."""
        return self.total <= share * memory


def forward_bytes(size: ModelSize, tokens: float, element: int) -> float:
    """The largest tensors that live together while a layer reads `tokens` positions without gradients.

    In the MLP: the residual, its norm, the gate, its activation and the up projection. In attention: the
    residual, its norm, queries before and after the rotation, keys and values repeated for all heads, and the
    result.
    """
    of_mlp = 2 * size.hidden_size + 3 * size.ffn_width
    of_attention = 2 * size.hidden_size + 5 * size.heads * size.head_dim
    return element * tokens * max(of_mlp, of_attention)


def reading_need(
    size: ModelSize,
    dtype: str,
    *,
    batch_tokens: int,
    logits: float,
    tensor: int = 1,
    pipeline: int = 1,
    chunked: bool = False,
) -> Need:
    """A GPU of a model that reads texts: captures, or scores.

    batch_tokens: positions of a batch. logits: positions of a batch whose logits are computed; all of them
    exist together, or with `chunked` only those of fuse_kernels.chunk_rows. tensor, pipeline: ranks over
    which the model is divided; device_map divides it like a pipeline.
    """
    element = BYTES[dtype]
    columns = -(-size.vocab_size // tensor)
    rows = min(logits, chunk_rows(columns, element)) if chunked else logits
    return Need(
        {
            "weights": size.weight_bytes(dtype) / (tensor * pipeline),
            # The tensors of the last layer are free again when the logits are computed.
            "workspace": max(
                forward_bytes(size, batch_tokens, element) / tensor,
                element * (rows * columns + batch_tokens * size.hidden_size),
            ),
            "context": CONTEXT,
        }
    )


def answering_need(
    size: ModelSize, dtype: str, *, rows: int, prompt: float, longest: float, top_p: float, gpus: int = 1
) -> Need:
    """A GPU of a model that answers in this process.

    rows: answers that are written together. prompt, longest: tokens of a prompt, and of a prompt with the
    longest answer. gpus: over which device_map divides the layers, and so the cache.
    """
    element = BYTES[dtype]
    sampled = _SAMPLED_BYTES + (_SORTED_BYTES if top_p < 1 else 0) + element
    return Need(
        {
            "weights": size.weight_bytes(dtype) / gpus,
            "cache": element * rows * longest * size.cached / gpus,
            "workspace": max(forward_bytes(size, rows * prompt, element), sampled * rows * size.vocab_size),
            "context": CONTEXT,
        }
    )


def served_need(size: ModelSize, dtype: str, *, rows: int, longest: float, tensor: int) -> Need:
    """A GPU of a server: its share of the weights, and of the keys and values of the requests that run
    together. A server fits within SERVER_SHARE of the memory.
    """
    # Fewer key/value heads than ranks are copied.
    ranks_of_cache = min(tensor, size.key_value_heads)
    return Need(
        {
            "weights": size.weight_bytes(dtype) / tensor,
            "cache": BYTES[dtype] * rows * longest * size.cached / ranks_of_cache,
            "context": CONTEXT,
        }
    )


def training_need(recipe: Recipe, architecture: Architecture, *, data_parallel_size: int) -> Need:
    """The rank of the pipeline stage that needs most, when documents are as long as training.seq_length."""
    stages = recipe.parallel.pipeline_model_parallel_size
    place = {"sequence": recipe.training.seq_length, "data_parallel_size": data_parallel_size}
    needs = []
    for stage in range(stages):
        memory = estimate_memory(recipe, architecture, stage=stage, **place)
        parts = asdict(memory) | {"workspace": workspace_bytes(recipe, architecture), "context": CONTEXT}
        needs.append(Need(parts))
    return max(needs, key=lambda need: need.total)


def workspace_bytes(recipe: Recipe, architecture: Architecture) -> float:
    """The gradients of one micro-batch that live together in the backward pass, before they are in the main
    gradients: that of the largest weight, and those of a layer's activations.
    """
    element = BYTES[recipe.training.precision]
    tensor = recipe.parallel.tensor_model_parallel_size
    tokens = recipe.training.micro_batch_size * recipe.training.seq_length
    embedding = architecture.padded_vocab_size * architecture.hidden_size / tensor
    of_layer = 2 * architecture.hidden_size + 4 * architecture.ffn_width / tensor
    # The fused loss adds its weight's gradient to the main gradients itself; the embedding's is whole.
    return element * max(embedding, tokens * of_layer)
