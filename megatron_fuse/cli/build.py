"""Aligns captures with the target's tokens and selects a source for every example.

    megatron-fuse build --recipe examples/quickstart/recipe.yaml
    torchrun --nproc-per-node 8 -m megatron_fuse.cli build --recipe ...    # rank r takes every 8th shard
    megatron-fuse build --recipe ... --claim    # any number of these, on any machines over one file system

Writes WORKDIR/fusion/MAP-UNMATCHED-T. If the documents are built already, only the selection and the values
that order the examples are made again, which takes about a second.
"""

import argparse

from megatron_fuse.cli.claim_arguments import add_claim_arguments, take_claims
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_claim_arguments(parser, may_leave=False)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    take_claims(arguments)
    with importing():
        from megatron_fuse.dataset import build_fusion_data
        from megatron_fuse.fusion_data.layout import TEXT
        from megatron_fuse.pipeline.idle_processes import warn_of_idle_processes
        from megatron_fuse.selection.curriculum import read_measures
        from megatron_fuse.selection.summary import curriculum_line, selection_line
        from megatron_fuse.stages import Context
        from megatron_fuse.storage import rank_and_world
    context = Context(recipe)
    warn_of_idle_processes(context)
    selections = build_fusion_data(context)
    if rank_and_world()[0] != 0:
        return
    for mode, selection in selections.items():
        say(selection_line(recipe, mode, selection))
    say(curriculum_line(recipe, read_measures(recipe, context.open(TEXT).sha256)))
