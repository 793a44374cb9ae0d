"""Shows one example of the fusion data: its tokens, and at each what the teacher says should come there.

    python tools/inspect_data.py --recipe examples/quickstart/recipe.yaml --index 0 --mode training [--source NAME] [--json]

--source is the selected one by default. --json prints one object: {"id", "mode", "source", "tokens": [{"id", "text", "supervised",
"match", "entries": [{"id", "text", "logprob"}], "tail"}]}; the entries at a token are the distribution that predicts that token.
"""

import argparse
import json

from megatron_fuse.capture import MODES
from megatron_fuse.errors import exit_code
from megatron_fuse.fusion_data import FusionDataset
from megatron_fuse.inspection import find_example, format_view, view_document
from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--index", type=int, help="number of the example in the instructions, from 0")
    which.add_argument("--id", help="id of the example")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--source", help="default: the source with the advantage")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    recipe = recipe_from_arguments(arguments)
    dataset = FusionDataset(recipe)
    example = find_example(dataset, arguments.index, arguments.id)
    view = view_document(recipe, dataset, arguments.mode, example, arguments.source)
    print(json.dumps(view, ensure_ascii=False) if arguments.json else format_view(view, dataset))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
