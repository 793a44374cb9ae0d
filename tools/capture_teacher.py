"""Captures what every source predicts over responses: its likeliest tokens and the exact mass of the rest.

    python tools/capture_teacher.py --recipe examples/quickstart/recipe.yaml [--source NAME ...] [--mode training|inference]
    torchrun --nproc-per-node 8 tools/capture_teacher.py --recipe ...         # rank r takes every 8th shard

Writes WORKDIR/captures/SOURCE/MODE; by default every source in every mode that the recipe's schedule learns from. Mode training
reads the ground-truth response, mode inference the source's own. Interrupted, it continues where it stopped. A source with
`captures: {MODE: FILE}` in the recipe is read from there instead (docs/captures.md).
"""

import argparse

import megatron_fuse.start  # noqa: F401
from megatron_fuse.capture import BACKENDS, capture, require_backend
from megatron_fuse.errors import exit_code
from megatron_fuse.pipeline.idle_processes import warn_of_idle_processes
from megatron_fuse.recipe import MODES, add_recipe_arguments, recipe_from_arguments
from megatron_fuse.stages import Context
from megatron_fuse.text_safety import say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    parser.add_argument("--source", action="append", metavar="NAME", help="only this source; may be repeated")
    parser.add_argument("--mode", choices=MODES, help="only this mode")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="hf: the source's model, in process; file: what sources.NAME.captures names. The recipe decides; given here, it is "
        "refused where the recipe has it otherwise",
    )
    parser.add_argument(
        "--no-truncate",
        action="store_true",
        help="keep all capture.top_k entries of every token: the same as --capture-top-p 1. The stages after this one compare "
        "a capture with the recipe, so that the recipe should say capture.top_p: 1 as well",
    )
    arguments = parser.parse_args()
    if arguments.no_truncate:
        setattr(arguments, "capture.top_p", "1")
    recipe = recipe_from_arguments(arguments)
    context = Context(recipe)
    warn_of_idle_processes(context)
    modes = [arguments.mode] if arguments.mode else recipe.modes_with_teacher
    if not modes:
        say("schedule: no phase has a lambda for a source's distributions: nothing to capture")
    for source in arguments.source or recipe.sources:
        for mode in modes:
            if arguments.backend:
                require_backend(recipe, source, mode, arguments.backend)
            artefact = capture(context, source, mode)
            if artefact:
                counts = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in artefact.counts.items())
                say(f"{artefact.directory}: {counts}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
