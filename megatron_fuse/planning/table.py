"""A plan as lines for a terminal."""

from collections.abc import Iterator

from megatron_fuse.pipeline.plan_table import readable_bytes
from megatron_fuse.planning import durations, memory, rates
from megatron_fuse.planning.layouts import TrainingChoice
from megatron_fuse.planning.memory import Need
from megatron_fuse.planning.plan import Plan
from megatron_fuse.planning.rates import Rates
from megatron_fuse.recipe import Recipe
from megatron_fuse.reporting.layout import Table, text_table

_PARTS = (
    *("weights", "gradients", "masters", "moments"),
    *("activations", "logits", "cache", "workspace", "context"),
)


def plan_lines(recipe: Recipe, plan: Plan, used: Rates) -> list[str]:
    """The whole plan. used: the rates that it was made with."""
    return [
        *_heading(recipe, plan),
        "",
        "Models, from config.json",
        *text_table(_model_table(plan)),
        "",
        "Stages, with the layout that fits",
        *text_table(_stage_table(plan)),
        "",
        "Memory of the busiest GPU of a stage, in GB",
        *text_table(_memory_table(plan)),
        "",
        *_training(plan),
        *_changes(plan),
        "Assumptions",
        *_assumptions(recipe, plan, used),
    ]


def _heading(recipe: Recipe, plan: Plan) -> list[str]:
    amounts = plan.amounts
    each = [
        total / amounts.examples
        for total in (amounts.prompt_tokens, amounts.response_tokens, amounts.answer_tokens)
    ]
    return [
        f"Plan for {plan.cluster}: an estimate from sizes and rates. Nothing was run.",
        f"{amounts.examples:,} examples with {each[0]:,.0f} + {each[1]:,.0f} tokens (prompt + ground truth); "
        f"answers of {each[2]:,.0f} tokens",
        f"All stages: {_hours(plan.gpu_hours * 3600 / plan.cluster.gpus)}, {plan.gpu_hours:,.0f} GPU hours, "
        f"{readable_bytes(sum(stage.disk for stage in plan.stages))} on disk"
        + ("" if plan.fits else "; NOT EVERY STAGE FITS"),
    ]


def _model_table(plan: Plan) -> Table:
    rows = []
    for key, size in plan.sizes.items():
        multiplied = size.multiplied + size.head
        bits = f"{size.quantised_bits} bits" if size.quantised_bits else "recipe's"
        rows.append(
            (
                key,
                f"{size.parameters / 1e9:,.2f} B",
                f"{multiplied / 1e9:,.2f} B",
                str(size.layers),
                f"{size.vocab_size:,}",
                bits,
            )
        )
    return ("model", "parameters", "used for a token", "layers", "vocabulary", "weights"), rows


def _stage_table(plan: Plan) -> Table:
    rows = [
        (
            stage.label,
            stage.layout,
            f"{stage.need.total / 1e9:,.1f} GB",
            "yes" if stage.fits else "NO",
            _hours(stage.seconds),
            f"{plan.cluster.gpus * stage.seconds / 3600:,.1f}",
            readable_bytes(stage.disk) if stage.disk else "-",
        )
        for stage in plan.stages
        if stage.need
    ]
    others = readable_bytes(sum(stage.disk for stage in plan.stages if not stage.need))
    rows.append(("stages without a GPU", "-", "-", "-", "-", "-", others))
    return ("stage", "layout", "memory", "fits", "time", "GPU hours", "disk"), rows


def _memory_table(plan: Plan) -> Table:
    labels: dict[tuple, list[str]] = {}  # stages that need the same are one row
    needs: dict[tuple, Need] = {}
    for stage in plan.stages:
        if stage.need:
            parts = tuple(stage.need.parts.items())
            labels.setdefault(parts, []).append(stage.label)
            needs[parts] = stage.need
    shown = [part for part in _PARTS if any(part in need.parts for need in needs.values())]
    rows = []
    for parts, need in needs.items():
        first, *others = labels[parts]
        rows.append(_memory_row(f"{first} and {len(others)} more" if others else first, need, shown))
    return ("stage", *shown, "total"), rows


def _memory_row(label: str, need: Need, shown: list[str]) -> tuple[str, ...]:
    cells = [f"{need.parts[part] / 1e9:,.1f}" if part in need.parts else "-" for part in shown]
    return (label, *cells, f"{need.total / 1e9:,.1f}")


def _training(plan: Plan) -> Iterator[str]:
    training = plan.training
    described = {
        "the recipe": training.own,
        "smallest change that fits": training.smallest,
        "fastest that fits": training.fastest,
    }
    rows = [(name, *_training_row(choice)) for name, choice in described.items() if choice is not None]
    yield "Training of the target"
    yield from text_table((("", "layout", "options", "memory", "fits", "time"), rows))
    for name, choice in described.items():
        if choice is not None and choice.words:
            yield f"  {name}: {choice.words}"
    if training.smallest is None and not training.own.fits:
        yield "  nothing that was tried fits: more GPUs, or GPUs with more memory, are needed"
    yield ""


def _training_row(choice: TrainingChoice) -> tuple[str, ...]:
    return (
        choice.layout,
        choice.options,
        f"{choice.need.total / 1e9:,.1f} GB",
        "yes" if choice.fits else "NO",
        _hours(choice.seconds),
    )


def _changes(plan: Plan) -> Iterator[str]:
    """What the recipe has to say differently for the layouts of the table, without the training's."""
    changes = dict.fromkeys(
        stage.change for stage in plan.stages if stage.change and stage.label != "training"
    )
    if changes:
        yield "The recipe does not fit as it is. The table's layouts need:"
        yield from (f"  {change}" for change in changes)
        yield ""


def _assumptions(recipe: Recipe, plan: Plan, used: Rates) -> Iterator[str]:
    names = {
        "training": "training step",
        "reading": "forward pass (captures, prompts, scores)",
        "bandwidth": "memory bandwidth of decoding",
        "layer_seconds": "shortest step of decoding in process",
        "link": "link between the GPUs of a node",
    }
    if plan.cluster.nodes > 1:
        names["network"] = "network between nodes"
    for name, words in names.items():
        yield f"  {words}: {used.origins[name]}"
    backends = {stage.layout for stage in plan.stages}
    if any(" x server" in layout for layout in backends):
        yield (
            f"  servers: at least {1e3 * rates.SERVED_LAYER_SECONDS:g} ms a layer and step; captures at "
            f"{durations.SERVED_CAPTURE_SHARE:g} of the forward pass's rate; {memory.SERVER_SHARE:g} of the "
            "memory"
        )
    if any(size.is_mixture for size in plan.sizes.values()):
        yield f"  mixtures of experts: {durations.MIXTURE_SHARE:g} of the rates of other models"
    if recipe.training.packing:
        yield f"  packed sequences: {1 - durations.PACKED_SHARE:.0%} padding"
    else:
        yield (
            f"  padding of a step without packing: to {durations.LONGEST_OVER_MEAN:g} x the mean length, at "
            "most to training.seq_length"
        )
    yield (
        f"  memory: {memory.FRAGMENTS:.0%} of a GPU stays unused between the allocator's blocks; documents "
        "as long as training.seq_length"
    )
    yield "  not counted: loading weights, checkpoints, and the stages without a GPU"


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
