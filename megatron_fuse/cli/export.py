"""Write the fused model of a recipe as a Hugging Face directory: weights, config, tokenizer and chat
template.

    megatron-fuse export --recipe examples/quickstart/recipe.yaml [--export-checkpoint latest] \
        [--export-dtype fp32]

Reads a checkpoint of any parallel layout, in one process, without Megatron or a GPU. The memory is that of
one file of weights (5 GB), however large the model is. A second run writes the model again
only if there is a newer checkpoint to export.
"""

import argparse

from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say

add_arguments = add_recipe_arguments


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from_arguments(arguments)
    with importing():
        from megatron_fuse.training.export import export_fused_model
    output, checkpoint = export_fused_model(recipe)
    say(f"{output}: the model of {checkpoint} in {recipe.export.dtype}")
