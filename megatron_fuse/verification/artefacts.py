"""The artefacts that fusion data consists of and was made from: their files, and what they say of their origin."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fuse.capture import MODES
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data import modes_with_teacher
from megatron_fuse.fusion_data.layout import BUILT_BY, teacher_directory, teacher_options, text_directory, text_options
from megatron_fuse.recipe import REFERENCE, TARGET, Recipe
from megatron_fuse.storage import Artefact, Workspace
from megatron_fuse.storage.artefact import shown
from megatron_fuse.storage.records import ManifestRecord, read_record
from megatron_fuse.target import target_hashes

Problems = Iterator[str]


@dataclass(frozen=True)
class Expected:
    """What an artefact has to be: options and inputs by the recipe, and the artefacts whose hashes it records, by input."""

    directory: Path
    needed: bool = False  # else it is looked at where it is there: a machine that trains needs no captures
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    parents: dict[str, Path] = field(default_factory=dict)
    mend: str = "restore it, or remove it and rerun its stage"


def expected_artefacts(recipe: Recipe, target: ChatFormat) -> list[Expected]:
    """Parents first."""
    work, hashes = Workspace(recipe.workdir), target_hashes(target)
    instructions = {"instructions": work.instructions}
    rebuild = f"remove it and run {BUILT_BY} again, or put the recipe's old value back"
    found = [Expected(work.instructions)]
    for name in [*recipe.sources, TARGET]:
        answers = {"responses": work.responses(name)}
        found.append(Expected(work.responses(name), parents=instructions))
        scorers = [*recipe.reward_models, REFERENCE]
        found += [Expected(work.scores(name, scorer), parents=answers) for scorer in scorers]
    for source in recipe.sources:
        answers = {"responses": work.responses(source)}
        for mode in MODES:
            parents = instructions | (answers if mode == "inference" else {})
            found.append(Expected(work.captures(source, mode), parents=parents))
    text = text_directory(recipe)
    found.append(Expected(text, True, text_options(recipe), hashes, instructions, rebuild))
    for mode in modes_with_teacher(recipe):
        for source in recipe.sources:
            parents = {"text": text, "capture": work.captures(source, mode)}
            directory = teacher_directory(recipe, source, mode)
            found.append(Expected(directory, True, teacher_options(recipe, mode), hashes, parents, rebuild))
    return found


def open_artefacts(expected: list[Expected], problems: list[str]) -> dict[Path, Artefact]:
    """Those that are there, by their directory, whatever state their files are in."""
    artefacts = {}
    for entry in expected:
        if not (entry.directory / "manifest.json").exists():
            if entry.needed:
                problems.append(f"{entry.directory}: missing or incomplete: run {BUILT_BY}")
            continue
        try:
            manifest = read_record(entry.directory / "manifest.json", ManifestRecord, entry.mend).content()
        except UserError as error:
            problems.append(str(error))
        else:
            artefacts[entry.directory] = Artefact(entry.directory, manifest)
    return artefacts


def file_problems(artefact: Artefact) -> Problems:
    """Files that are missing or not what the stage wrote."""
    for name in artefact.manifest["files"]:
        try:
            artefact.checked(artefact.directory / name)
        except UserError as error:
            yield str(error)


def lineage_problems(entry: Expected, artefacts: dict[Path, Artefact]) -> Problems:
    """Options and inputs that are not the recipe's, and recorded hashes of parents that are not those that are there."""
    manifest = artefacts[entry.directory].manifest
    there = {key: artefacts[path].sha256 for key, path in entry.parents.items() if path in artefacts}
    for section, wanted in {"options": entry.options, "inputs": entry.inputs | there}.items():
        for key, want in wanted.items():
            have = manifest[section].get(key)
            if have != want:
                whose = f"{entry.parents[key]} is" if key in there else "the recipe has"
                facts = f"{section}.{key} is {shown(have)}, {whose} {shown(want)}"
                yield f"{entry.directory}/manifest.json: {facts}: {entry.mend}"
