"""Generates every model's answers to the instructions: one answer per example and model.

    megatron-fuse generate --recipe examples/quickstart/recipe.yaml [--source NAME ...]
    torchrun --nproc-per-node 8 -m megatron_fuse.cli generate --recipe ...    # rank r takes every 8th shard
    megatron-fuse generate --recipe ... --claim    # any number of these, on any machines over one file system

Writes WORKDIR/responses/NAME, by default for all models whose answers the recipe uses: the sources if a phase
gives the inference mode a weight, and the target (`--source target`) if its reward orders the examples. After
an interruption, the same command continues where it stopped.

The recipe decides where answers come from. By default the model generates them in process. With
`sources.NAME.server` an OpenAI-compatible server generates them. With `sources.NAME.responses` they are read
from a file (docs/responses.md).
"""

import argparse

from megatron_fuse.cli.claim_arguments import add_claim_arguments, take_claims
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.recipe.backends import RESPONSE_BACKENDS
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_claim_arguments(parser, may_leave=True)
    parser.add_argument(
        "--source",
        action="append",
        metavar="NAME",
        help="only this source, or `target`; can be given several times",
    )
    parser.add_argument(
        "--backend",
        choices=RESPONSE_BACKENDS,
        help="hf: run the model in this process. openai: ask the server of NAME.server. file: read the file "
        "that NAME.responses names. The recipe decides; this option is an error if the recipe decides "
        "otherwise",
    )


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    take_claims(arguments)
    with importing():
        from megatron_fuse.pipeline.idle_processes import warn_of_idle_processes
        from megatron_fuse.responses import backend_of, generate_responses
        from megatron_fuse.stages import Context
    context = Context(recipe)
    warn_of_idle_processes(context)
    names = arguments.source or list(recipe.answering)
    if not names:
        say(
            "schedule: no phase gives the inference mode a weight, nor does the target's reward order the "
            "examples: no answers are needed (--source NAME makes them all the same)"
        )
    for name in names:
        if arguments.backend not in (None, backend_of(recipe, name)):
            raise UserError(
                f"--backend {arguments.backend}: in the recipe, {name!r} answers by backend "
                f"{backend_of(recipe, name)}. Change its keys server and responses (docs/responses.md)."
            )
    for name in names:
        artifact = generate_responses(context, name)
        if artifact:
            say(artifact.summary)
