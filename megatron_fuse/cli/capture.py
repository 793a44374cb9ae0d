"""Captures every source's distributions over responses: its likeliest tokens and the exact mass of the rest.

    megatron-fuse capture --recipe examples/quickstart/recipe.yaml [--source NAME ...] [--mode \
        training|inference]
    torchrun --nproc-per-node 8 -m megatron_fuse.cli capture --recipe ...    # rank r takes every 8th shard
    megatron-fuse capture --recipe ... --claim    # any number of these, on any machines over one file system

Writes WORKDIR/captures/SOURCE/MODE, by default for every source and every mode that the recipe's schedule
learns from. Mode training reads the ground truth, mode inference the source's own answer. After an
interruption, the same command continues where it stopped. A source with `backend: megatron` is divided over
the ranks of torchrun by `parallel` (docs/large_sources.md). With `backend: server` a vLLM or SGLang server
reads the conversations. If the recipe has `captures: {MODE: FILE}` for a source, the file is read instead
(docs/captures.md).
"""

import argparse

from megatron_fuse.cli.claim_arguments import add_claim_arguments, take_claims
from megatron_fuse.recipe import MODES, add_recipe_arguments, recipe_from_arguments
from megatron_fuse.recipe.backends import CAPTURE_BACKENDS
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_claim_arguments(parser, may_leave=True)
    parser.add_argument(
        "--source",
        action="append",
        metavar="NAME",
        help="capture only this source; can be given several times",
    )
    parser.add_argument("--mode", choices=MODES, help="capture only this mode")
    parser.add_argument(
        "--backend",
        choices=CAPTURE_BACKENDS,
        help="hf: run the source's model in this process. megatron: run it in Megatron-core, divided over "
        "the processes. server: ask the server of sources.NAME.server. file: read the file that "
        "sources.NAME.captures names. The recipe decides; this option is an error if the recipe decides "
        "otherwise",
    )
    parser.add_argument(
        "--no-truncate",
        action="store_true",
        help="keep all capture.top_k entries of every token, the same as --capture-top-p 1. Set "
        "capture.top_p: 1 in the recipe too, because the later stages compare a capture with the recipe",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.no_truncate:
        setattr(arguments, "capture.top_p", "1")
    recipe = recipe_from_arguments(arguments)
    take_claims(arguments)
    with importing():
        from megatron_fuse.capture import capture, require_backend
        from megatron_fuse.pipeline.idle_processes import warn_of_idle_processes
        from megatron_fuse.runtime import stop_runtime
        from megatron_fuse.stages import Context
    context = Context(recipe)
    warn_of_idle_processes(context)
    modes = [arguments.mode] if arguments.mode else recipe.modes_with_teacher
    if not modes:
        say("schedule: no phase has a lambda for a source's distributions: nothing to capture")
    for source in arguments.source or recipe.sources:
        for mode in modes:
            if arguments.backend:
                require_backend(recipe, source, mode, arguments.backend)
            artifact = capture(context, source, mode)
            if artifact:
                say(artifact.summary)
    stop_runtime()
