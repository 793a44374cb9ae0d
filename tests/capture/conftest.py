"""Fixtures of the tests of capture."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from exported_captures import SOURCE
from megatron_captures import recipe_content, run_captures, save_sources, write_data
from small_captures import Models, build_world, changed, fresh_recipe

from megatron_fuse.capture import capture
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.stages import Context


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    """Three sources that have answered; to be read."""
    return build_world(tmp_path_factory.mktemp("answered"))


@pytest.fixture
def fresh(world: tuple[Path, Models], tmp_path: Path) -> Recipe:
    """`world` in a directory of the test's own, without captures."""
    return fresh_recipe(world, tmp_path)


@pytest.fixture(scope="session")
def captured(world: tuple[Path, Models], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """SOURCE has read the ground truth, and all entries are stored; to be read."""
    recipe = changed(fresh_recipe(world, tmp_path_factory.mktemp("captured")), capture={"top_p": 1.0})
    capture(Context(recipe), SOURCE, "training")
    return recipe


@pytest.fixture
def copied_capture(captured: Recipe, tmp_path: Path) -> Recipe:
    """`captured` in a directory of the test's own, to be changed."""
    shutil.copytree(captured.workdir, tmp_path / "run")
    return captured.model_copy(update={"workdir": tmp_path / "run"})


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe, whose captures in process are done."""
    root = tmp_path_factory.mktemp("megatron")
    write_data(root)
    content = recipe_content(root, save_sources(root))
    recipe = make_recipe(content)
    prepare_instructions(Context(recipe))
    generate_responses(Context(recipe), "wide")
    run_captures(content)
    return content
