"""Shows one example of fusion data, each token with the teacher's distribution; or checks all fusion data; or
compares a capture with the source's model.

    megatron-fuse inspect WORKDIR/fusion/exact-skip-T2 --index 0 --mode training [--source NAME] [--json]
    megatron-fuse inspect WORKDIR/fusion/exact-skip-T2 --verify
    megatron-fuse inspect --recipe examples/quickstart/recipe.yaml --id ID --mode inference
    megatron-fuse inspect --template MODEL
    megatron-fuse inspect --recipe examples/quickstart/recipe.yaml --template
    megatron-fuse inspect --recipe R.yaml --capture SOURCE --mode training [--examples 64]

--source: default is the selected source. --json prints one object: {"id", "mode", "source", "tokens": [{"id",
"text", "supervised", "match", "entries": [{"id", "text", "logprob"}], "tail"}]}. The entries at a token are
the distribution that PREDICTS that token.
--verify reads every file and lists all problems. The exit code is 2 if there are any.
--template shows a sample conversation as a model reads it: which tokens are learned, what ends an answer, and
where generation begins. It takes a model directory, or the target, the sources and the reward models of a
recipe. It needs no fusion data.
--capture reads captured examples again with the source's model in this process, and prints how far the two
lie apart. It is for captures of a server or of a file, if the weights are on this machine too.
"""

import argparse
import json
from typing import Any

from megatron_fuse.cli.fusion_data_arguments import add_fusion_data_arguments
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import MODES
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say

# The recipe has an option --verify for training. Here --verify is the option of this command, which replaces
# it.
PARSER = {"conflict_handler": "resolve"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_fusion_data_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--index", type=int, help="number of the example in the instructions, counted from 0")
    what.add_argument("--id", help="id of the example")
    what.add_argument(
        "--template",
        nargs="?",
        const="",
        metavar="MODEL",
        help="show how MODEL, or each model of the recipe, reads a conversation",
    )
    what.add_argument(
        "--capture", metavar="SOURCE", help="compare the capture of SOURCE with its model in this process"
    )
    what.add_argument("--verify", action="store_true", help="check every file, row and choice")
    parser.add_argument("--mode", choices=MODES, help="mode of the document; needed to show an example")
    parser.add_argument("--source", help="source of the document; default: the source with the advantage")
    parser.add_argument(
        "--examples", type=int, default=64, help="most examples that --capture reads; default: 64"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    if arguments.verify and (arguments.json or arguments.mode or arguments.source):
        raise UserError(
            "--verify checks all examples, but --mode, --source and --json choose or show one example. "
            "Remove them."
        )
    if arguments.template is not None and (arguments.mode or arguments.source):
        raise UserError(
            "--template shows conversations without data, but --mode and --source choose the document of an "
            "example. Remove them."
        )
    if arguments.examples < 1:
        raise UserError(f"--examples is {arguments.examples}. Set it to 1 or more.")
    if arguments.capture is not None and arguments.source:
        raise UserError("--capture names the source already. Remove --source.")
    if arguments.template is not None:
        _show_templates(arguments)
    elif arguments.verify:
        _verify(arguments)
    elif arguments.mode is None:
        raise UserError("--mode is missing. It is needed to show an example, and with --capture.")
    elif arguments.capture is not None:
        _compare_capture(arguments)
    else:
        _show_example(arguments)


def _show_example(arguments: argparse.Namespace) -> None:
    with importing():
        from megatron_fuse.dataset import FusionDataset
        from megatron_fuse.dataset.directory import fusion_data_recipe
        from megatron_fuse.inspection.documents import find_example, format_view, view_document
    recipe = fusion_data_recipe(arguments)
    dataset = FusionDataset(recipe)
    example = find_example(dataset, arguments.index, arguments.id)
    view = view_document(recipe, dataset, arguments.mode, example, arguments.source)
    say(_as_json(view) if arguments.json else format_view(view, dataset))


def _compare_capture(arguments: argparse.Namespace) -> None:
    with importing():
        from megatron_fuse.dataset.directory import fusion_data_recipe
        from megatron_fuse.inspection.captures import compare_capture, format_comparison
        from megatron_fuse.stages import Context
    context = Context(fusion_data_recipe(arguments))
    found = compare_capture(context, arguments.capture, arguments.mode, arguments.examples)
    say(_as_json(found) if arguments.json else format_comparison(found))


def _show_templates(arguments: argparse.Namespace) -> None:
    """Prints the template view of one model, or of all models of the recipe."""
    with importing():
        from megatron_fuse.dataset.directory import fusion_data_recipe
        from megatron_fuse.inspection.templates import (
            format_of_model,
            format_template_view,
            formats_of,
            view_template,
        )
        from megatron_fuse.stages import Context
    if arguments.template:
        formats = [(arguments.template, format_of_model(arguments.template))]
    else:
        formats = list(formats_of(Context(fusion_data_recipe(arguments))))
    views = [view_template(name, chat) for name, chat in formats]
    say("\n".join(map(_as_json, views)) if arguments.json else "\n\n".join(map(format_template_view, views)))


def _as_json(view: dict[str, Any]) -> str:
    """The view as JSON. If a text is not safe for a terminal, all other than ASCII characters are escaped."""
    text = json.dumps(view, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(view)


def _verify(arguments: argparse.Namespace) -> None:
    """Checks all fusion data and prints the numbers of checked items. Raises UserError with all problems."""
    with importing():
        from megatron_fuse.dataset.directory import fusion_data_recipe
        from megatron_fuse.stages import Context
        from megatron_fuse.verification import verify_fusion_data
    context = Context(fusion_data_recipe(arguments))
    result = verify_fusion_data(context)
    say(", ".join(f"{amount:,} {name.replace('_', ' ')}" for name, amount in result.counts.items()))
    if result.problems:
        raise UserError(f"{len(result.problems)} problems:\n" + "\n".join(result.problems))
    say("all is well")
