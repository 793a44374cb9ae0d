"""Lets every reward model judge every source's answers.

    python tools/score_responses.py --recipe examples/quickstart/recipe.yaml [--source NAME ...] [--reward-model NAME ...]
    torchrun --nproc-per-node 8 tools/score_responses.py --recipe ...         # rank r takes every 8th shard

Writes WORKDIR/scores/SOURCE/REWARD_MODEL, one float32 for each example. Interrupted, it continues where it stopped.
"""

import argparse

from megatron_fuse.advantage.scores import score_responses
from megatron_fuse.errors import exit_code
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    parser.add_argument("--source", action="append", metavar="NAME", help="only this source; may be repeated")
    parser.add_argument("--reward-model", action="append", metavar="NAME", help="only this judge; may be repeated")
    arguments = parser.parse_args()
    recipe = recipe_from_arguments(arguments)
    for reward_model in arguments.reward_model or recipe.reward_models:
        for artefact in score_responses(recipe, reward_model, arguments.source or list(recipe.sources)):
            counts = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in artefact.counts.items())
            print(f"{artefact.directory}: {counts}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
