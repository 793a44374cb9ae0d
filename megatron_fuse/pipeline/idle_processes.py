"""Warns of idle processes.

Processes that share a stage take whole shards: with fewer shards than processes, some are idle.
data.shard_size does not depend on the number of processes. So the shards, and every artifact, are the same
for any number.
"""

import logging
import os

from megatron_fuse.claiming import claiming
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import INSTRUCTIONS
from megatron_fuse.processes import STARTED
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context
from megatron_fuse.storage import rank_and_world

logger = logging.getLogger(__name__)


def idle_line(recipe: Recipe, examples: int, processes: int) -> str | None:
    """A line that says what to change so that every process has a shard; None if every process has one.

    Also None if processes do not take shards one by one: by claim, others may join and leave; and a source in
    Megatron may take several processes for a shard.
    """
    if claiming() or any(source.parallel.model_parallel_size > 1 for source in recipe.sources.values()):
        return None
    size = recipe.data.shard_size
    shards = -(-examples // size)
    if processes <= shards:
        return None
    idle = processes - shards
    useful = max(examples // processes, 1)
    advice = f"Start {shards} processes, because there are no more examples."
    if useful < size:
        advice = f"Set data.shard_size to {useful}{' or less' * (useful > 1)}."
        if INSTRUCTIONS.directory(recipe).exists():
            advice += (
                f" The prepared data keep their shards: remove {recipe.workdir} to make them, and all data "
                "made from them, again."
            )
    return (
        f"data.shard_size is {size}, so {examples} example{'s' * (examples != 1)} are {shards} "
        f"shard{'s' * (shards != 1)}, and {idle} of {processes} processes {'has' if idle == 1 else 'have'} "
        f"no work in the stages before training. {advice}"
    )


def warn_of_idle_processes(context: Context) -> None:
    """Warns by idle_line in the first process of a stage, unless the command that started it has done so."""
    rank, processes = rank_and_world()
    if rank != 0 or processes == 1 or STARTED in os.environ:
        return
    try:
        instructions = context.open(INSTRUCTIONS)
    except UserError:  # the stage itself reports the error
        return
    if line := idle_line(context.recipe, instructions.counts["examples"], processes):
        logger.warning(f"{instructions.directory}: {line}")
