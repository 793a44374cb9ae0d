"""Write the fused model of a recipe as a Hugging Face directory: weights, config, tokenizer and chat template.

    python tools/export_model.py --recipe examples/quickstart/recipe.yaml [--export-checkpoint latest] [--export-dtype fp32]

Works from a checkpoint of any layout, in one process, without a GPU. A second run writes anew only if the checkpoint moved on.
"""

import megatron_fuse.start  # noqa: F401
from megatron_fuse.errors import exit_code
from megatron_fuse.recipe import load_recipe
from megatron_fuse.runtime import start_runtime, stop_runtime
from megatron_fuse.text_safety import say


def main() -> None:
    recipe = load_recipe(__doc__)
    start_runtime()
    from megatron_fuse.training.export import export_fused_model

    output, checkpoint = export_fused_model(recipe)
    say(f"{output}: the model of {checkpoint} in {recipe.export.dtype}")
    stop_runtime()


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
