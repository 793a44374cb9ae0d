"""Shows one example of fusion data, its tokens and what the teacher says should come at each; or checks all of it.

    python tools/inspect_data.py WORKDIR/fusion/exact-skip-T2 --index 0 --mode training [--source NAME] [--json]
    python tools/inspect_data.py WORKDIR/fusion/exact-skip-T2 --verify
    python tools/inspect_data.py --recipe examples/quickstart/recipe.yaml --id ID --mode inference
    python tools/inspect_data.py --template MODEL
    python tools/inspect_data.py --recipe examples/quickstart/recipe.yaml --template

--source is the selected one by default. --json prints one object: {"id", "mode", "source", "tokens": [{"id", "text", "supervised",
"match", "entries": [{"id", "text", "logprob"}], "tail"}]}; the entries at a token are the distribution that PREDICTS that token.
--verify reads every file, lists all that is wrong and ends with 2 where anything is.
--template shows a sample conversation as a model reads it: which tokens are learned, what ends an answer and where generation begins;
of a model directory, or of the target, the sources and the reward models of a recipe. It needs no fusion data.
"""

import argparse
import json
import sys
from typing import Any

import megatron_fuse.start  # noqa: F401
from megatron_fuse.dataset import FusionDataset
from megatron_fuse.dataset.directory import add_fusion_data_arguments, fusion_data_recipe
from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.inspection.documents import find_example, format_view, view_document
from megatron_fuse.inspection.templates import format_of_model, format_template_view, formats_of, view_template
from megatron_fuse.recipe import MODES, Recipe
from megatron_fuse.stages import Context
from megatron_fuse.text_safety import say
from megatron_fuse.verification import verify_fusion_data


def main() -> None:
    # resolve: the recipe has a --verify too, of a training; here the word means this tool's own.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_fusion_data_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--index", type=int, help="number of the example in the instructions, from 0")
    what.add_argument("--id", help="id of the example")
    what.add_argument(
        "--template",
        nargs="?",
        const="",
        metavar="MODEL",
        help="show how MODEL, or each model of the recipe, reads a conversation",
    )
    what.add_argument("--verify", action="store_true", help="check every file, row and choice")
    parser.add_argument("--mode", choices=MODES, help="needed for an example")
    parser.add_argument("--source", help="default: the source with the advantage")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.verify and (arguments.json or arguments.mode or arguments.source):
        parser.error("--verify looks at everything: --mode, --source and --json belong to one example")
    if arguments.template is not None:
        if arguments.mode or arguments.source:
            parser.error("--template shows conversations without data: --mode and --source belong to one example")
        show_templates(arguments)
        return
    if not arguments.verify and arguments.mode is None:
        parser.error("--mode is needed to show an example")
    recipe = fusion_data_recipe(arguments)
    if arguments.verify:
        verify(recipe)
        return
    dataset = FusionDataset(recipe)
    example = find_example(dataset, arguments.index, arguments.id)
    view = view_document(recipe, dataset, arguments.mode, example, arguments.source)
    say(_as_json(view) if arguments.json else format_view(view, dataset))


def show_templates(arguments: argparse.Namespace) -> None:
    """Prints the template view of one model, or of all models of the recipe."""
    if arguments.template:
        formats = [(arguments.template, format_of_model(arguments.template))]
    else:
        formats = list(formats_of(Context(fusion_data_recipe(arguments))))
    views = [view_template(name, chat) for name, chat in formats]
    say("\n".join(map(_as_json, views)) if arguments.json else "\n\n".join(map(format_template_view, views)))


def _as_json(view: dict[str, Any]) -> str:
    """With JSON's own escapes where a terminal must not see a text as it is."""
    text = json.dumps(view, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(view)


def verify(recipe: Recipe) -> None:
    """Prints what was looked at. Raises UserError with all that was found wrong."""
    found = verify_fusion_data(Context(recipe), progress=lambda line: say(line, file=sys.stderr))
    say(", ".join(f"{amount:,} {name.replace('_', ' ')}" for name, amount in found.counts.items()))
    if found.problems:
        raise UserError(f"{len(found.problems)} problems:\n" + "\n".join(found.problems))
    say("all is well")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
