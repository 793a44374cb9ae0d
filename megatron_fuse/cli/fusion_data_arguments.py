"""The arguments of commands that read fusion data. dataset/directory.py makes a recipe from them."""

import argparse

from megatron_fuse.recipe import add_recipe_arguments, path_argument


def add_fusion_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds DIR, the fusion directory, and the recipe's arguments. A command needs either DIR or --recipe."""
    parser.add_argument(
        "directory", nargs="?", type=path_argument, metavar="DIR", help="WORKDIR/fusion/MAP-UNMATCHED-T"
    )
    add_recipe_arguments(parser, required=False)
