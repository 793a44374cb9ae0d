"""Chooses layouts: how a source is divided over GPUs, and with which options a target is trained.

Pure functions of sizes: nothing here reads a file or needs a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.model.architecture import Architecture, check_layout, shares_sequence
from megatron_fuse.model.pipeline_split import stated_split
from megatron_fuse.planning.durations import Layout
from megatron_fuse.planning.gpus import Cluster
from megatron_fuse.planning.memory import FRAGMENTS, SERVER_SHARE, Need
from megatron_fuse.planning.sizes import ModelSize
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.model_parallel import SEQUENCE_MULTIPLE

_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Choice:
    """A layout with a token budget, what a GPU then needs, the seconds that the work takes, and whether the
    GPU has the memory.
    """

    layout: Layout
    batch_tokens: int
    need: Need
    seconds: float
    fits: bool


Cost = Callable[[Layout, int], tuple[Need, float]]
"""Memory of a GPU and seconds of the work, under a layout and with so many tokens of a batch."""


def choose(
    layouts: Sequence[Layout], batch_tokens: int, least_tokens: float, cluster: Cluster, cost: Cost
) -> Choice:
    """The first layout, if it fits with the batch or with a half, a quarter ... of it; else the fastest of
    the others, with the largest batch that fits; else, as nothing fits, what needs the least memory.

    least_tokens: a batch must not become smaller.
    """
    budgets = [batch_tokens]
    while budgets[-1] // 2 >= least_tokens:
        budgets.append(budgets[-1] // 2)

    def judged(layout: Layout, tokens: int) -> Choice:
        need, seconds = cost(layout, tokens)
        share = SERVER_SHARE if layout.backend == "server" else 1 - FRAGMENTS
        return Choice(layout, tokens, need, seconds, need.fits(cluster.gpu.memory, share))

    for tokens in budgets:
        if (own := judged(layouts[0], tokens)).fits:
            return own
    for tokens in budgets:
        if fitting := [choice for layout in layouts if (choice := judged(layout, tokens)).fits]:
            return min(fitting, key=lambda choice: choice.seconds)
    return min((judged(layout, budgets[-1]) for layout in layouts), key=lambda choice: choice.need.total)


def in_process_layouts(cluster: Cluster) -> list[Layout]:
    """One process on each GPU, then fewer processes with several GPUs of their node (device_map)."""
    sizes = [size for size in _SIZES if size <= cluster.per_node]
    return [Layout("hf", pipeline=size, replicas=cluster.per_node // size * cluster.nodes) for size in sizes]


def megatron_layouts(cluster: Cluster, size: ModelSize) -> list[Layout]:
    """Tensor parallelism within a node, the least that divides heads and key/value heads first, then with
    pipelines over nodes.
    """
    layouts = []
    for tensor in _SIZES:
        if tensor > cluster.per_node or size.heads % tensor or size.key_value_heads % tensor:
            continue
        for pipeline in _SIZES:
            gpus = tensor * pipeline
            if 1 < gpus <= cluster.gpus and cluster.gpus % gpus == 0 and pipeline <= size.layers:
                layouts.append(Layout("megatron", tensor, pipeline, cluster.gpus // gpus))
    return layouts


def fits_model(layout: Layout, architecture: Architecture) -> bool:
    """Whether Megatron can divide the model so."""
    try:
        check_layout(
            architecture,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
        )
    except UserError:
        return False
    return True


def server_layouts(cluster: Cluster, size: ModelSize) -> list[Layout]:
    """Servers with tensor parallelism within a node, then with pipelines over nodes."""
    layouts = []
    for tensor in _SIZES:
        if tensor <= cluster.per_node and size.heads % tensor == 0:
            layouts.append(Layout("server", tensor, 1, cluster.per_node // tensor * cluster.nodes))
    widest = layouts[-1].tensor
    for pipeline in range(2, cluster.nodes + 1):
        if cluster.nodes % pipeline == 0:
            layouts.append(Layout("server", widest, pipeline, cluster.nodes // pipeline))
    return layouts


Change = dict[str, dict[str, Any]]
"""Options that differ: section of the recipe -> key -> value."""


@dataclass(frozen=True)
class TrainingChoice:
    """A training whose options differ from the recipe's by `change` (empty: the recipe's own)."""

    recipe: Recipe
    change: Change
    data_parallel_size: int
    need: Need
    seconds: float
    fits: bool

    @property
    def layout(self) -> str:
        parallel = self.recipe.parallel
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        experts = parallel.expert_model_parallel_size
        return f"TP {tensor} x PP {pipeline} x DP {self.data_parallel_size}" + (
            f" (EP {experts})" if experts > 1 else ""
        )

    @property
    def options(self) -> str:
        """The options that decide memory and speed, in words."""
        parallel, training = self.recipe.parallel, self.recipe.training
        flags = {
            "distributed optimizer": parallel.use_distributed_optimizer,
            "recompute": training.recompute,
            "fused linear loss": self.recipe.loss.fused_linear,
            "packing": training.packing,
        }
        words = [f"micro-batch {training.micro_batch_size}"]
        return ", ".join([*words, *(name for name, is_on in flags.items() if is_on)])

    @property
    def words(self) -> str:
        """The change as keys of the recipe; empty if there is none."""
        return ", ".join(
            f"{section}.{key}: {str(value).lower() if isinstance(value, bool) else value}"
            for section, options in self.change.items()
            for key, value in options.items()
        )


TrainingCost = Callable[[Recipe], tuple[Need, float]]


def training_choices(
    recipe: Recipe, architecture: Architecture, cluster: Cluster, cost: TrainingCost
) -> tuple[TrainingChoice, TrainingChoice | None, TrainingChoice | None]:
    """The recipe's own options; the smallest change that fits, if they do not fit; and the fastest options
    that fit, if they are faster than both.

    The smallest change has the fewest options, and of these it is the fastest. The last two are None if there
    are none. Raises UserError if the recipe's layout does not divide the model or the GPUs.
    """
    refusal = _refusal(recipe, architecture, cluster)
    if refusal:
        raise UserError(refusal)
    judged = [_judged(recipe, {}, cluster, cost)]
    for change in _changes(recipe, architecture, cluster):
        changed = _with(recipe, change)
        if not _refusal(changed, architecture, cluster):
            judged.append(_judged(changed, change, cluster, cost))
    own, fitting = judged[0], [choice for choice in judged if choice.fits]
    if not fitting:
        return own, None, None
    smallest = min(fitting, key=lambda choice: (_number(choice), choice.seconds))
    fastest = min(fitting, key=lambda choice: (round(choice.seconds), _number(choice)))
    return (
        own,
        None if smallest is own else smallest,
        None if fastest.seconds > 0.97 * smallest.seconds else fastest,
    )


def _number(choice: TrainingChoice) -> int:
    return sum(map(len, choice.change.values()))


def _judged(recipe: Recipe, change: Change, cluster: Cluster, cost: TrainingCost) -> TrainingChoice:
    need, seconds = cost(recipe)
    data = cluster.gpus // recipe.parallel.model_parallel_size
    return TrainingChoice(recipe, change, data, need, seconds, need.fits(cluster.gpu.memory))


def _changes(recipe: Recipe, architecture: Architecture, cluster: Cluster) -> Iterator[Change]:
    """All combinations of the options that decide memory and speed, without those that the recipe has."""
    parallel, training = recipe.parallel, recipe.training
    switches: list[Change] = []
    if not parallel.use_distributed_optimizer:
        switches.append({"parallel": {"use_distributed_optimizer": True}})
    if not recipe.loss.fused_linear:
        switches.append({"loss": {"fused_linear": True}})
    if not training.recompute:
        switches.append({"training": {"recompute": True}})
    if not training.packing:
        switches.append(
            {
                "training": {"packing": True}
                | ({"micro_batch_size": 1} if training.micro_batch_size > 1 else {})
            }
        )
    if training.micro_batch_size > 1:
        switches.append({"training": {"micro_batch_size": 1}})
    for layout in [{}, *_other_layouts(recipe, architecture, cluster)]:
        for count in range(len(switches) + 1):
            for chosen in combinations(switches, count):
                if change := _merged([layout, *chosen]):
                    yield change


def _other_layouts(recipe: Recipe, architecture: Architecture, cluster: Cluster) -> Iterator[Change]:
    """Layouts that differ from the recipe's. The experts of a mixture are shared by whole ranks."""
    is_mixture = architecture.experts is not None
    for tensor, pipeline, experts in product(_SIZES, _SIZES, _SIZES if is_mixture else (1,)):
        if tensor > cluster.per_node or pipeline * max(tensor, experts) > cluster.gpus:
            continue
        wanted: dict[str, Any] = {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
        }
        if is_mixture:
            wanted |= {
                "expert_model_parallel_size": experts,
                "expert_tensor_parallel_size": None if tensor == 1 else 1,
            }
        now = recipe.parallel
        if differing := {name: value for name, value in wanted.items() if value != getattr(now, name)}:
            yield {"parallel": differing}


def _merged(changes: Sequence[Change]) -> Change:
    merged: Change = {}
    for change in changes:
        for section, options in change.items():
            merged[section] = merged.get(section, {}) | options
    return merged


def _with(recipe: Recipe, change: Change) -> Recipe:
    """A recipe with other options. model_copy does not check them: each combination here is allowed."""
    sections = {name: getattr(recipe, name).model_copy(update=options) for name, options in change.items()}
    return recipe.model_copy(update=sections)


def _refusal(recipe: Recipe, architecture: Architecture, cluster: Cluster) -> str | None:
    """Why these GPUs cannot train the target at the recipe's layout; None if they can."""
    parallel = recipe.parallel
    if cluster.gpus % parallel.model_parallel_size:
        return (
            f"the recipe's tensor x pipeline parallelism needs a multiple of {parallel.model_parallel_size} "
            f"GPUs, but --gpus is {cluster}. Change parallel, or plan for other GPUs."
        )
    of_experts = parallel.experts_size * parallel.pipeline_model_parallel_size
    if cluster.gpus % of_experts:
        return (
            f"the recipe's experts need a multiple of {of_experts} GPUs, but --gpus is {cluster}. Change "
            "parallel, or plan for other GPUs."
        )
    tensor = parallel.tensor_model_parallel_size
    shared = shares_sequence(architecture, tensor, parallel.sequence_parallel)
    if shared and (tensor == 1 or SEQUENCE_MULTIPLE % tensor):
        return f"the tensor-parallel ranks cannot share sequences at tensor_model_parallel_size {tensor}"
    try:
        check_layout(
            architecture,
            **parallel.sizes,
            split=stated_split(parallel),
            seq_length=recipe.training.seq_length,
        )
    except UserError as refusal:
        return str(refusal)
    return None
