"""The time of each kind of work on a cluster, from sizes, layouts and rates.

Not counted: loading weights, checkpoints, and the stages that need no GPU.
"""

import math
from dataclasses import dataclass

from megatron_fuse.planning.gpus import Cluster
from megatron_fuse.planning.rates import SERVED_LAYER_SECONDS, Rates
from megatron_fuse.planning.sizes import BYTES, ModelSize
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.model_parallel import ParallelOptions

# The longest document of a step over the mean one, to which the others are padded without packing. With 128
# real conversations a step, 67 % of the positions are padding (docs/benchmarks.md).
LONGEST_OVER_MEAN = 3.0
# Share of packed positions that carry a token; 1.3 % were padding in the same benchmark.
PACKED_SHARE = 0.98
# New prompts begin when a quarter of the places is free (sources/generation.py), so about 1 in 8 is empty.
FILLED_PLACES = 0.85
# The products of a mixture's experts have few rows each.
MIXTURE_SHARE = 0.5
# A server that returns prompt_logprobs computes a log-softmax of every position, and Python objects of it.
SERVED_CAPTURE_SHARE = 0.5


@dataclass(frozen=True)
class Layout:
    """How a source uses the GPUs: replicas of the model, each over tensor x pipeline GPUs.

    backend: hf (in process; with several pipeline GPUs, device_map divides the layers), megatron, or server.
    """

    backend: str
    tensor: int = 1
    pipeline: int = 1
    replicas: int = 1

    @property
    def gpus_of_replica(self) -> int:
        return self.tensor * self.pipeline

    @property
    def busy(self) -> int:
        """GPUs that compute at the same time. Under device_map the GPUs of a process wait for each other."""
        return self.replicas * (1 if self.backend == "hf" else self.gpus_of_replica)

    def __str__(self) -> str:
        if self.backend == "hf":
            each = "1 GPU" if self.pipeline == 1 else f"{self.pipeline} GPUs (device_map)"
            return f"{self.replicas} x hf, {each}"
        divided = f"TP {self.tensor}" + (f" x PP {self.pipeline}" if self.pipeline > 1 else "")
        return f"{self.replicas} x {self.backend}, {divided}"


def _mixture(size: ModelSize) -> float:
    """The share of a rate that a mixture of experts reaches; 1 for other models."""
    return MIXTURE_SHARE if size.is_mixture else 1.0


def _unevenness(shards: int, replicas: int) -> float:
    """The work of the busiest replica over the mean, as shards are not divided."""
    return math.ceil(shards / replicas) * replicas / shards


def _all_reduce_seconds(elements: float, ranks: int, rate: float, element: int) -> float:
    """A ring sends 2 (p - 1) / p of the bytes through every rank."""
    return element * elements * 2 * (ranks - 1) / ranks / rate


def reading_seconds(
    size: ModelSize,
    dtype: str,
    layout: Layout,
    rates: Rates,
    *,
    tokens: float,
    mean_length: float,
    logits: float,
    shards: int,
    batch_tokens: int,
) -> float:
    """All replicas read `tokens` in texts of mean_length, and compute the logits of some.

    A tensor-parallel layer has two all-reduces. A pipeline fills and drains once in each shard, whose batches
    have batch_tokens each.
    """
    rate = rates.reading * _mixture(size) * (SERVED_CAPTURE_SHARE if layout.backend == "server" else 1)
    computing = size.forward_flops(tokens, mean_length, logits) / (rate * layout.busy)
    if layout.backend == "megatron":
        computing *= 1 + (layout.pipeline - 1) / math.ceil(tokens / shards / batch_tokens)
    elements = 2 * size.layers * tokens * size.hidden_size * layout.tensor / layout.busy
    sending = _all_reduce_seconds(elements, layout.tensor, rates.link, BYTES[dtype])
    return (computing + sending) * _unevenness(shards, layout.replicas)


def answering_seconds(
    size: ModelSize,
    dtype: str,
    layout: Layout,
    rates: Rates,
    *,
    answers: float,
    prompt: float,
    answer: float,
    rows: int,
    shards: int,
) -> float:
    """All replicas read prompts and write answers, `rows` at a time in each replica.

    A step of decoding gives every row a token. It takes as long as the slowest of: starting its kernels;
    reading the weights and the cache; the products.
    """
    reading = size.forward_flops(answers * prompt, prompt, answers) / (
        rates.reading * _mixture(size) * layout.busy
    )
    cache = BYTES[dtype] * rows * (prompt + answer / 2) * size.cached
    # Under device_map a step reads one GPU after the other, which takes as long as from one GPU.
    readers = layout.gpus_of_replica if layout.backend == "server" else 1
    in_process = rates.layer_seconds if layout.backend == "hf" else SERVED_LAYER_SECONDS
    step = max(
        size.layers * in_process,
        (size.weight_bytes(dtype) + cache) / (rates.bandwidth * readers),
        2 * (size.multiplied + size.head) * rows / (rates.reading * _mixture(size) * readers),
    )
    steps = answers * answer / (rows * FILLED_PLACES * layout.replicas)
    # Fewer answers than places: the longest one decides.
    steps = max(steps, answer)
    return (reading + steps * step) * _unevenness(shards, layout.replicas)


@dataclass(frozen=True)
class TrainingWork:
    """What a training reads.

    tokens: of all documents and epochs. mean_length: of a document. samples: examples of all steps. steps: of
    the whole training.
    """

    tokens: float
    mean_length: float
    steps: int


def training_seconds(
    recipe: Recipe, size: ModelSize, work: TrainingWork, cluster: Cluster, rates: Rates
) -> float:
    """The steps of a training at the recipe's layout.

    Model FLOPs are three times those of a forward pass, recomputed ones a fourth time. Padding costs as much
    as tokens. What comes on top: the pipeline's bubble, the all-reduces of tensor parallelism, the way of the
    tokens to their experts and back, and the sum of the gradients over the data-parallel ranks.
    """
    layout, training = recipe.parallel, recipe.training
    element = BYTES[training.precision]
    ranks = cluster.gpus
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    data = ranks // layout.model_parallel_size
    length = padded_length(recipe, work.mean_length)
    positions = (
        work.tokens * length / work.mean_length if not training.packing else work.tokens / PACKED_SHARE
    )
    passes = 4 if training.recompute else 3
    flops = passes * size.forward_flops(positions, length, positions)
    computing = flops / (rates.training * _mixture(size) * ranks)
    micro_batches = max(positions / work.steps / length / (training.micro_batch_size * data), 1.0)
    virtual = layout.virtual_pipeline_model_parallel_size or 1
    computing *= 1 + (pipeline - 1) / (math.ceil(micro_batches) * virtual)
    # Two all-reduces in each layer and direction, for the positions of this tensor group.
    elements = 4 * size.layers / pipeline * positions / data * size.hidden_size
    sending = _all_reduce_seconds(elements, tensor, rates.link, element)
    # To the experts and back, forward and backward. The tensor ranks share the positions.
    tokens = 4 * size.layers / pipeline * positions / data / tensor * size.experts_per_token
    sending += _dispatch_seconds(layout, tokens * size.hidden_size * element, cluster, rates)
    return (
        computing
        + sending
        + work.steps * _exposed(layout, size, cluster, rates, data, computing / work.steps)
    )


def _dispatch_seconds(layout: ParallelOptions, bytes_sent: float, cluster: Cluster, rates: Rates) -> float:
    """The time in which a rank sends tokens to experts of other ranks."""
    experts = layout.expert_model_parallel_size
    rate = rates.link if layout.experts_size <= cluster.per_node else min(rates.link, rates.network)
    return bytes_sent * (experts - 1) / experts / rate


def padded_length(recipe: Recipe, mean_length: float) -> float:
    """Positions of a document with its padding; packed ones have none."""
    if recipe.training.packing:
        return mean_length
    return max(min(LONGEST_OVER_MEAN * mean_length, recipe.training.seq_length), mean_length)


def _exposed(
    layout: ParallelOptions, size: ModelSize, cluster: Cluster, rates: Rates, data: int, computing: float
) -> float:
    """Seconds of a step in which ranks only exchange gradients (fp32) and updated weights (bf16).

    Overlapped sums hide behind the computation of the last micro-batches, here a half of it.
    """
    of_experts = size.expert_parameters / layout.pipeline_model_parallel_size / layout.experts_size
    shared = (size.parameters - size.expert_parameters) / layout.model_parallel_size
    # Megatron numbers tensor ranks first, then data-parallel ones. In a node with several ranks of a group
    # NCCL's rings leave through all of their network cards.
    in_one_node = layout.tensor_model_parallel_size * data <= cluster.per_node
    through_cards = rates.network * cluster.per_node / layout.tensor_model_parallel_size
    rate = rates.link if in_one_node else min(rates.link, through_cards)
    bytes_of_one = 2 * 4 if not layout.use_distributed_optimizer else 4 + 2
    replicas = layout.expert_replicas(data)
    sending = bytes_of_one * (shared * (data - 1) / data + of_experts * (replicas - 1) / replicas) / rate
    return max(sending - computing / 2, 0.0) if layout.overlap_grad_reduce else sending
