"""Fusion data as training reads them, and as inspect_data.py --verify does."""

import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
from campaign import FuzzTarget
from file_damage import Mutation, mutate
from small_fusion import SOURCES, build_world

from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.dataset.checksums import verify_once
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.stage_options import ScheduleOptions
from megatron_fuse.stages import Context
from megatron_fuse.storage import read_sealed, sha256_of_file, write_sealed
from megatron_fuse.verification import verify_fusion_data


@cache
def world() -> Recipe:
    """Models, captures and fusion data that no target damages."""
    recipe = build_world(Path(tempfile.mkdtemp(prefix="fuzz-fusion-")))
    ordered = recipe.model_copy(
        update={"schedule": recipe.schedule.model_copy(update={"order": "target_reward"})}
    )
    build_fusion_data(Context(ordered))
    return ordered


def recipe_in(directory: Path) -> Recipe:
    return world().model_copy(update={"workdir": directory})


def make_seeds(directory: Path) -> None:
    source = world().workdir
    for path in (source / "fusion").rglob("*"):
        if path.is_file():
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def all_that_training_reads(recipe: Recipe) -> str:
    """A hash of every document of every source, and of all that decides which of them a step learns from,
    and how.
    """
    dataset = FusionDataset(recipe)
    order = dataset.curriculum
    verify_once(dataset.artifacts)
    digest = sha256(
        repr((dataset.sha256, order and order.sha256, dataset.example_ids, dataset.entries_per_row)).encode()
    )
    for array in (dataset.train, dataset.validation):
        digest.update(array.tobytes())
    for mode in ("training", "inference") if dataset.selections else ("training",):
        digest.update(dataset.lengths(mode).tobytes() + dataset.supervised_tokens(mode).tobytes())
        digest.update(dataset.example_weights(mode).tobytes())
        for example in range(len(dataset.example_ids)):
            digest.update(repr(dataset.selected_source(mode, example)).encode())
            for source in (None, *(SOURCES if dataset.selections else ())):
                for name, array in vars(dataset.document(mode, example, source)).items():
                    digest.update(name.encode() + str(array.dtype).encode() + array.tobytes())
    return digest.hexdigest()


@cache
def undamaged() -> str:
    return all_that_training_reads(world())


def read_as_training_does(directory: Path) -> None:
    expected = undamaged()
    assert all_that_training_reads(recipe_in(directory)) == expected, "other data, and no word about it"


def without_teachers(recipe: Recipe) -> Recipe:
    """Its text has no choice between sources that would know the text's manifest."""
    return recipe.model_copy(update={"schedule": ScheduleOptions(preset="csft")})


def read_own_up(directory: Path) -> None:
    """Values that the checksums vouch for need not be possible ones."""
    with np.errstate(all="ignore"):
        all_that_training_reads(without_teachers(recipe_in(directory)))


def verify(directory: Path) -> None:
    problems = verify_fusion_data(Context(recipe_in(directory))).problems
    if problems:
        raise UserError(problems[0])


def change(path: Path, random: Random) -> Mutation:
    """What a checksum finds has no key."""
    found = mutate(path, random)
    return Mutation(found.file, f"file of fusion data, {found.what}")


def change_and_own_up(path: Path, random: Random) -> Mutation:
    """The manifest then says what the file now holds, as if the stage had written it."""
    found = change(path, random)
    manifest = path.parent / "manifest.json"
    if path.is_file() and path != manifest and manifest.exists():
        content = read_sealed(manifest)
        if path.name in content["files"]:
            content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            write_sealed(manifest, content)
    return found


TARGETS = [
    FuzzTarget("fusion-training", make_seeds, read_as_training_does, change=change),
    FuzzTarget("fusion-owned-up", make_seeds, read_own_up, ("**/text/*",), 0.7, change_and_own_up),
    FuzzTarget("fusion-verify", make_seeds, verify, share=0.3, change=change_and_own_up),
]
