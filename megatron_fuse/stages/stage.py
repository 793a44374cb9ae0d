"""The record of a stage. Each stage of the pipeline is declared once, as a Stage, in the module of the stage.

The records decide the order of the stages, the words of `--until`, the table of `--plan`, the comparisons
when an artifact is opened, the checks of lineage, and the command that an error names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.recipe import Recipe

Key = tuple[str, ...]
"""Key of an artifact of a stage: () for the only one; (source,), (source, mode) or (model, reward model)."""

Parents = dict[str, tuple["Stage", Key]]
"""The artifacts that an artifact is made from, by the names under which it records their hashes."""

Hashes = dict[str, str]
"""Hashes of inputs that are no artifacts, by the names under which they are recorded."""


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _no_cost(*_: Any) -> float:
    return 0.0


@dataclass(frozen=True)
class Stage:
    """One kind of artifact and the command that makes it.

    The functions get the names of a key as their last arguments.

    name: the step of the pipeline, as in `--until`. One command makes all stages that have the same name.
    recorded_as: the name of the stage in plan.json and manifest.json.
    command: the command that makes one artifact, as a user types it; `{}` stands for a name of its key.
    keys(recipe): the keys of the artifacts that the recipe needs.
    directory(recipe, *key): the directory of an artifact.
    options(recipe, *key): every option of the recipe that changes the bytes.
    parents(recipe, *key): the artifacts that it is made from.
    formats(context, *key): hashes of tokenizers and chat templates.
    origin(context, *key): hashes of weights and of the user's files. A machine that only reads the artifact
    may lack these.
    packages(recipe, *key): options that depend on the machine, such as versions of packages. They are
    recorded, and only the stage itself compares them.
    flops(context, amounts, *key), disk(recipe, amounts, *key): cost for `--plan`, in floating-point
    operations and in bytes.
    state(context, *key): the state of a result that is no artifact, such as checkpoints.
    always: every run of the command makes it again, which takes about a second.
    one_process: the command does not run under torchrun.
    remove(recipe): the directory that must be removed before the artifact is made again; default: its own
    directory.
    """

    name: str
    recorded_as: str
    command: str
    keys: Callable[[Recipe], list[Key]]
    directory: Callable[..., Path]
    options: Callable[..., dict[str, Any]] = _nothing
    parents: Callable[..., Parents] = _nothing
    formats: Callable[..., Hashes] = _nothing
    origin: Callable[..., Hashes] = _nothing
    packages: Callable[..., dict[str, Any]] = _nothing
    flops: Callable[..., float] = _no_cost
    disk: Callable[..., float] = _no_cost
    state: Callable[..., str] | None = None
    always: bool = False
    one_process: bool = False
    # For a stage whose units of work are not the shards of examples.
    shard_names: tuple[str, ...] | None = None
    remove: Callable[[Recipe], Path] | None = None

    @property
    def module(self) -> list[str]:
        """The command without its arguments, as words for `python` or torchrun.

        The words begin with `-m`, so that Python finds the package wherever it is installed.
        """
        program, *words = self.command.split()
        return words[:2] if program == "python" else ["-m", "megatron_fuse.cli", words[0]]

    def label(self, recipe: Recipe, *key: str) -> str:
        """The name of an artifact in tables: its directory relative to the workdir, else the stage's name."""
        directory = self.directory(recipe, *key)
        return (
            str(directory.relative_to(recipe.workdir))
            if directory.is_relative_to(recipe.workdir)
            else self.name
        )
