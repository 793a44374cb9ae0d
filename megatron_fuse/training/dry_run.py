"""--dry-run: prints the memory and the steps of a run,
from the model and the data that are really built for it."""

from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fuse.reporting.layout import Table, text_table
from megatron_fuse.text_safety import say
from megatron_fuse.training.learning_rate import LearningRate
from megatron_fuse.training.memory import Memory, estimate_memory, readable_size, sequence_of_run
from megatron_fuse.training.plan import PhasePlan
from megatron_fuse.training.trainer import Trainer


def print_dry_run(trainer: Trainer) -> None:
    """Prints the parameters and a memory estimate of every pipeline stage, and the step plan,
    on the reporting rank.

    Collectives: one gather of two numbers from every rank.
    """
    runtime, stage = trainer.runtime, parallel_state.get_pipeline_model_parallel_rank()
    local = stage, sum(weight.numel() for chunk in trainer.chunks for weight in chunk.parameters())
    built = [local] * runtime.world_size
    dist.all_gather_object(built, local)
    parameters = dict(sorted(built))  # all tensor and data ranks of a stage hold equally many parameters
    sequence = sequence_of_run(trainer.recipe, trainer.dataset)
    place = {"sequence": sequence, "data_parallel_size": runtime.data_parallel_size}
    memory = {
        stage: estimate_memory(trainer.recipe, trainer.architecture, stage=stage, **place)
        for stage in parameters
    }
    training = trainer.recipe.training
    kind = "packed" if training.packing else "padded to the longest document"
    largest = f"{training.micro_batch_size} x {sequence} positions, {kind}"
    validation_examples = len(trainer.dataset.validation)
    plans, rate = trainer.log.plans, trainer.learning_rate
    if runtime.is_logging_rank:
        text = dry_run_text(
            parameters, memory, plans, largest, validation_examples=validation_examples, learning_rate=rate
        )
        say("\n".join(text))


def dry_run_text(
    parameters: dict[int, int],
    memory: dict[int, Memory],
    plans: Sequence[PhasePlan],
    micro_batch: str,
    *,
    validation_examples: int,
    learning_rate: LearningRate,
) -> list[str]:
    """Lines for a terminal. parameters, memory: by pipeline stage, of one rank. micro_batch: the size of the
    largest one, in words."""
    return [
        "One rank of each pipeline stage: parameters, and about how much memory it needs at the height of a "
        "step",
        *text_table(_memory_table(parameters, memory)),
        f"  largest micro-batch: {micro_batch}",
        "  activations: see training/memory.py for the formula; communication buffers and fragments come on "
        "top",
        "",
        f"Steps of the schedule (without the {validation_examples:,} validation examples)",
        *text_table(_step_table(plans)),
        f"  learning rate: {learning_rate}",
        "",
        "dry run: nothing was trained",
    ]


def _memory_table(parameters: dict[int, int], memory: dict[int, Memory]) -> Table:
    names = list(vars(next(iter(memory.values()))))
    rows = [
        (
            str(stage),
            f"{parameters[stage]:,}",
            *(readable_size(size) for size in vars(estimate).values()),
            readable_size(estimate.total),
        )
        for stage, estimate in memory.items()
    ]
    return ("stage", "parameters", *names, "total"), rows


def _step_table(plans: Sequence[PhasePlan]) -> Table:
    modes = sorted({mode for plan in plans for mode in plan.supervised_tokens})
    rows = [
        (
            plan.name,
            f"{plan.first_iteration + 1:,} - {plan.last_iteration:,}",
            *(f"{number:,}" for number in (plan.steps, plan.samples, plan.tokens)),
            *(f"{plan.supervised_tokens.get(mode, 0):,}" for mode in modes),
        )
        for plan in plans
    ]
    sums = [
        sum(column)
        for column in zip(*((plan.steps, plan.samples, plan.tokens) for plan in plans), strict=True)
    ]
    of_modes = [sum(plan.supervised_tokens.get(mode, 0) for plan in plans) for mode in modes]
    rows.append(("run", "", *(f"{number:,}" for number in (*sums, *of_modes))))
    return (
        "phase",
        "iterations",
        "steps",
        "samples",
        "tokens",
        *(f"supervised, {mode}" for mode in modes),
    ), rows
