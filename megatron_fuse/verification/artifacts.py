"""The artifacts that fusion data consists of and was made from: their files, and what they say of their origin."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.capture import CAPTURES
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import BUILT_BY, TEACHERS, TEXT
from megatron_fuse.instructions import INSTRUCTIONS
from megatron_fuse.responses import RESPONSES
from megatron_fuse.scoring.reference_scores import REFERENCE_SCORES
from megatron_fuse.scoring.scores import SCORES
from megatron_fuse.stages import Context, Key, Stage
from megatron_fuse.storage import Artifact
from megatron_fuse.storage.artifact import shown
from megatron_fuse.storage.records import ManifestRecord, read_record

Problems = Iterator[str]

DATA_STAGES = (INSTRUCTIONS, RESPONSES, SCORES, REFERENCE_SCORES, CAPTURES, TEXT, TEACHERS)


@dataclass(frozen=True)
class Expected:
    """What an artifact has to be: options and inputs by the recipe, and the artifacts whose hashes it records, by input."""

    directory: Path
    needed: bool  # else it is looked at where it is there: a machine that trains needs no captures
    options: dict[str, Any]
    inputs: dict[str, str]
    parents: dict[str, Path]
    fix: str


def expected_artifacts(context: Context) -> list[Expected]:
    """All that the recipe's fusion data consists of and comes from, parents first."""
    expected = []
    for stage in DATA_STAGES:
        for key in stage.keys(context.recipe):
            expected.append(_expected(context, stage, key))
    return expected


def _expected(context: Context, stage: Stage, key: Key) -> Expected:
    recipe, is_fusion_data = context.recipe, stage in (TEXT, TEACHERS)
    parents = {name: parent.directory(recipe, *names) for name, (parent, names) in stage.parents(recipe, *key).items()}
    return Expected(
        stage.directory(recipe, *key),
        is_fusion_data,
        stage.options(recipe, *key),
        stage.formats(context, *key) if is_fusion_data else {},
        parents,
        f"remove it and run {stage.command.format(*key)} again, or put the recipe's old value back",
    )


def open_artifacts(expected: list[Expected], problems: list[str]) -> dict[Path, Artifact]:
    """Those that are there, by their directory, whatever state their files are in."""
    artifacts = {}
    for entry in expected:
        if not (entry.directory / "manifest.json").exists():
            if entry.needed:
                problems.append(f"{entry.directory}: missing or incomplete: run {BUILT_BY}")
            continue
        try:
            manifest = read_record(entry.directory / "manifest.json", ManifestRecord, entry.fix).content()
        except UserError as error:
            problems.append(str(error))
        else:
            artifacts[entry.directory] = Artifact(entry.directory, manifest)
    return artifacts


def file_problems(artifact: Artifact) -> Problems:
    """Files that are missing or not what the stage wrote."""
    for name in artifact.manifest["files"]:
        try:
            artifact.checked(artifact.directory / name)
        except UserError as error:
            yield str(error)


def lineage_problems(entry: Expected, artifacts: dict[Path, Artifact]) -> Problems:
    """Options and inputs that are not the recipe's, and recorded hashes of parents that are not those that are there."""
    manifest = artifacts[entry.directory].manifest
    there = {key: artifacts[path].sha256 for key, path in entry.parents.items() if path in artifacts}
    for section, wanted in {"options": entry.options, "inputs": entry.inputs | there}.items():
        for key, want in wanted.items():
            have = manifest[section].get(key)
            if have != want:
                whose = f"{entry.parents[key]} is" if key in there else "the recipe has"
                facts = f"{section}.{key} is {shown(have)}, {whose} {shown(want)}"
                yield f"{entry.directory}/manifest.json: {facts}: {entry.fix}"
