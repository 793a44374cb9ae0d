"""The record of a stage. Each stage of the pipeline is declared once, in its own module, as one of these.

From the records follow the order of the stages, `--until` and `--plan`, what is compared when an artifact is opened, lineage checks, and
the command that an error names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.recipe import Recipe

Key = tuple[str, ...]
"""Which of a stage's artifacts: () if there is one, (source,), (source, mode) or (model, reward model)."""

Parents = dict[str, tuple["Stage", Key]]
"""Artifacts that an artifact is made from, by the name under which it records their hashes."""

Hashes = dict[str, str]
"""Hashes of what is no artifact, by the name under which it is recorded."""


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _no_cost(*_: Any) -> float:
    return 0.0


@dataclass(frozen=True)
class Stage:
    """One kind of artifact and the command that makes it. The functions get a key's names as their last arguments.

    name: the step of the pipeline, as `--until` takes it. Stages with one name are made by one command.
    recorded_as: the stage in plan.json and manifest.json. command: what makes one artifact, as a user types it; `{}` stands for a name
    of its key.
    keys(recipe): the artifacts that the recipe needs. directory(recipe, *key). options(recipe, *key): every option of the recipe
    that changes the bytes. parents(recipe, *key).
    formats(context, *key): tokenizers and chat templates. origin(context, *key): weights and files of the user, which a machine
    that only uses the artifact need not have.
    packages(recipe, *key): options that the machine decides, as versions of packages. They are recorded, and compared by the stage
    itself alone.
    flops(context, amounts, *key), disk(recipe, amounts, *key): cost, in operations and bytes, for `--plan`.
    state(context, *key): of what is no artifact, as checkpoints. always: made anew by every run of the command, in a second.
    one_process: the command does not run under torchrun. remove(recipe): what has to be removed before the artifact is made anew;
    by default its directory.
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
    shard_names: tuple[str, ...] | None = None  # of a stage that makes one unit of work, whatever the number of shards
    remove: Callable[[Recipe], Path] | None = None

    @property
    def module(self) -> list[str]:
        """The command without its arguments, as words for `python` or torchrun: they find the package, wherever it is installed."""
        program, *words = self.command.split()
        return words[:2] if program == "python" else ["-m", "megatron_fuse.cli", words[0]]

    def label(self, recipe: Recipe, *key: str) -> str:
        """What plans and tables call an artifact: its directory under the recipe's workdir."""
        directory = self.directory(recipe, *key)
        return str(directory.relative_to(recipe.workdir)) if directory.is_relative_to(recipe.workdir) else self.name
