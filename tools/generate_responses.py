"""Lets every source answer every instruction once.

    python tools/generate_responses.py --recipe examples/quickstart/recipe.yaml [--source NAME ...]
    torchrun --nproc-per-node 8 tools/generate_responses.py --recipe ...      # rank r takes every 8th shard

Writes WORKDIR/responses/SOURCE. Interrupted, it continues where it stopped. A source with `responses: FILE.jsonl` in the recipe
is read from there instead.
"""

import argparse

from megatron_fuse.errors import exit_code
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.responses import generate_responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    parser.add_argument("--source", action="append", metavar="NAME", help="only this source; may be repeated")
    arguments = parser.parse_args()
    recipe = recipe_from_arguments(arguments)
    for source in arguments.source or recipe.sources:
        artefact = generate_responses(recipe, source)
        if artefact:
            counts = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in artefact.counts.items())
            print(f"{artefact.directory}: {counts}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
