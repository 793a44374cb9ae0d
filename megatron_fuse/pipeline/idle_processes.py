"""Processes that share a stage take whole shards: where there are fewer shards than processes, some have nothing to do.

data.shard_size does not follow the number of processes by itself: the shards, and so every artifact, are the same for any number.
"""

import os
from collections.abc import Callable

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import INSTRUCTIONS
from megatron_fuse.processes import STARTED
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context
from megatron_fuse.storage import rank_and_world
from megatron_fuse.text_safety import say


def idle_line(recipe: Recipe, examples: int, processes: int) -> str | None:
    """What to change so that every process has a shard; None where that is so."""
    size = recipe.data.shard_size
    shards = -(-examples // size)
    if processes <= shards:
        return None
    idle = processes - shards
    useful = max(examples // processes, 1)
    advice = f"start {shards}: there are no more examples"
    if useful < size:
        advice = f"set data.shard_size to {useful}{' or less' * (useful > 1)}"
        if INSTRUCTIONS.directory(recipe).exists():
            advice += f"; what is prepared keeps its shards: remove {recipe.workdir} to make it, and all that came of it, again"
    return (
        f"data.shard_size is {size}, so that {examples} example{'s' * (examples != 1)} are {shards} shard{'s' * (shards != 1)}, and "
        f"{idle} of {processes} processes {'has' if idle == 1 else 'have'} nothing to do in the stages before training: {advice}"
    )


def warn_of_idle_processes(context: Context, progress: Callable[[str], None] = say) -> None:
    """For a stage that begins: its first process says idle_line, unless the command that has started it does."""
    rank, processes = rank_and_world()
    if rank != 0 or processes == 1 or STARTED in os.environ:
        return
    try:
        instructions = context.open(INSTRUCTIONS)
    except UserError:  # the stage says what is wrong
        return
    if line := idle_line(context.recipe, instructions.counts["examples"], processes):
        progress(f"{instructions.directory}: {line}")
