"""The entry point of `megatron-fuse`: finds the module of a command, and imports only this one."""

import megatron_fuse.start  # noqa: F401  # first: from here on Ctrl-C ends with one line

# isort: split

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fuse.errors import exit_code
from megatron_fuse.logs import add_log_level, start_logging
from megatron_fuse.recipe import path_argument

COMMANDS = {
    "plan": "show what of a recipe is done, what will run, and how much it may cost",
    "run": "run all stages of a recipe that are not done: data, training, export",
    "prepare": "stage: sample the instructions and fit them to length",
    "generate": "stage: generate the answers of every model",
    "score": "stage: score the answers",
    "capture": "stage: capture the distributions of the sources",
    "build": "stage: write the distributions in the target's tokens, and the winner of every example",
    "inspect": "show an example of the fusion data, check all examples, or show how a model reads a "
    "conversation",
    "report": "report which source has the advantage, or how well the tokens are aligned",
    "convert": "convert between Hugging Face directories, Megatron checkpoints and GGUF files",
    "export": "stage: write the fused model as a Hugging Face directory",
    "evaluate": "compare models on benchmarks, or by judged answers to open-ended prompts",
    "merge": "merge models of one architecture into one, without training",
    "experiments": "run variants of one recipe with several seeds",
    "chat": "chat with a model in a terminal",
    "check-gpu": "check this project on the GPU of this machine",
}
"""Name of every command -> one line about it. The module has the same name, with _ for -."""

SHELLS = ("bash", "zsh")
_AFTERWORD = """
`megatron-fuse COMMAND --help` describes a command. Under torchrun a stage is
`torchrun ... -m megatron_fuse.cli COMMAND`, and the training alone is
`torchrun ... -m megatron_fuse.pretrain`.
"""


def program() -> int:
    """The main function of the installed program `megatron-fuse`. Returns the exit code."""
    return exit_code(main)


def main(words: Sequence[str] | None = None) -> int | None:
    """Runs `megatron-fuse WORDS`; None: the words of this process's command line."""
    words = sys.argv[1:] if words is None else words
    chosen = next((word for word in words if not word.startswith("-")), None)
    arguments = make_parser([chosen] if chosen in COMMANDS else []).parse_args(words)
    start_logging(arguments.log_level)
    return _module(arguments.command).run(arguments)


def door(command: str) -> Callable[[], int | None]:
    """The main function of a script for this command alone, such as those in tools/."""

    def main() -> int | None:
        module = _module(command)
        parser = argparse.ArgumentParser(**_parser_options(module))
        module.add_arguments(parser)
        add_log_level(parser)
        arguments = parser.parse_args()
        start_logging(arguments.log_level)
        return module.run(arguments)

    return main


def make_parser(filled: Collection[str]) -> argparse.ArgumentParser:
    """The parser of `megatron-fuse`. Only the commands in `filled` have their arguments.

    The modules of the other commands are not imported.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-fuse",
        description="Fuse several large language models into one (ProFuser, arXiv 2408.04998).",
        epilog=_AFTERWORD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print a script for this shell that completes",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name in filled:
            module = _module(name)
            described = commands.add_parser(name, help=summary, **_parser_options(module))
            module.add_arguments(described)
            add_log_level(described)
        else:
            commands.add_parser(name, help=summary)
    return parser


class _PrintCompletion(argparse.Action):
    """Prints the completion script of a shell and exits, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None
    ) -> None:
        import shtab

        described = make_parser(COMMANDS)
        commands = next(
            action for action in described._actions if isinstance(action, argparse._SubParsersAction)
        )
        for action in (action for command in commands.choices.values() for action in command._actions):
            if action.type in (Path, path_argument):
                action.complete = shtab.FILE
        print(shtab.complete(described, values))
        parser.exit()


def _module(command: str) -> ModuleType:
    return import_module(f"megatron_fuse.cli.{command.replace('-', '_')}")


def _parser_options(module: ModuleType) -> dict[str, Any]:
    described = {"description": module.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    return described | getattr(module, "PARSER", {})
