"""Checks of the artifacts of fusion data and of their parents: the files, and the recorded origin."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.dataset import data_parents
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY, TEACHERS, TEXT
from megatron_fuse.selection.choice import SELECTION
from megatron_fuse.selection.curriculum import CURRICULUM
from megatron_fuse.stages import Context, Key, Stage, lineage
from megatron_fuse.storage import Artifact
from megatron_fuse.storage.artifact import shown
from megatron_fuse.storage.records import ManifestRecord, read_record

Problems = Iterator[str]


@dataclass(frozen=True)
class Expected:
    """What an artifact must record: options and inputs as in the recipe, and the hashes of its parents.

    parents: name of the input -> directory of the parent. fix: what the user must do about a difference.
    """

    directory: Path
    needed: bool  # False: it may be missing, as a machine that only trains needs no captures
    options: dict[str, Any]
    inputs: dict[str, str]
    parents: dict[str, Path]
    fix: str


def expected_artifacts(context: Context) -> list[Expected]:
    """All artifacts of the recipe's fusion data and those that it is made from, parents first."""
    made = lineage(context.recipe, data_parents(context.recipe))
    # A selection and the order of the examples are single files without a manifest.
    return [_expected(context, stage, key) for stage, key in made if stage not in (SELECTION, CURRICULUM)]


def _expected(context: Context, stage: Stage, key: Key) -> Expected:
    recipe, is_fusion_data = context.recipe, stage in (TEXT, TEACHERS)
    parents = {
        name: parent.directory(recipe, *names)
        for name, (parent, names) in stage.parents(recipe, *key).items()
    }
    return Expected(
        stage.directory(recipe, *key),
        is_fusion_data,
        stage.options(recipe, *key),
        stage.formats(context, *key) if is_fusion_data else {},
        parents,
        f"Remove it and run {stage.command.format(*key)} again, or restore the old value in the recipe.",
    )


def open_artifacts(expected: list[Expected], problems: list[str]) -> dict[Path, Artifact]:
    """The artifacts that have a manifest, by directory. Their files may be damaged.

    Adds to `problems` what is missing.
    """
    artifacts = {}
    for entry in expected:
        if not (entry.directory / "manifest.json").exists():
            if entry.needed:
                problems.append(f"{entry.directory}: missing or incomplete. Run {BUILT_BY}.")
            continue
        try:
            manifest = read_record(entry.directory / "manifest.json", ManifestRecord, entry.fix).content()
        except UserError as error:
            problems.append(str(error))
        else:
            artifacts[entry.directory] = Artifact(entry.directory, manifest)
    return artifacts


def file_problems(artifact: Artifact) -> Problems:
    """One line for every file that is missing or is not what the stage wrote."""
    for name in artifact.manifest["files"]:
        try:
            artifact.checked(artifact.directory / name)
        except UserError as error:
            yield str(error)


def lineage_problems(entry: Expected, artifacts: dict[Path, Artifact]) -> Problems:
    """One line for each option or input that differs from the recipe, or hash that differs from the parent's.

    A parent that is missing is not compared.
    """
    manifest = artifacts[entry.directory].manifest
    parents = {key: artifacts[path].sha256 for key, path in entry.parents.items() if path in artifacts}
    for section, wanted in {"options": entry.options, "inputs": entry.inputs | parents}.items():
        for key, want in wanted.items():
            have = manifest[section].get(key)
            if have != want:
                whose = f"{entry.parents[key]} is" if key in parents else "the recipe has"
                difference = f"{section}.{key} is {shown(have)}, but {whose} {shown(want)}"
                yield f"{entry.directory}/manifest.json: {difference}. {entry.fix}"
