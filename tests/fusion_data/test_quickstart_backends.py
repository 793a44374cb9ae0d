"""The quickstart's own recipe with its Llama in process, in Megatron and behind a server.

Slow, and only after `make quickstart`, whose models, answers and scores it takes.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from fusion_comparison import HALF, compare_fusion_data
from local_server import scripted
from local_teacher import LocalTeacher

from megatron_fuse.capture import capture
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.stages import Context

ROOT = Path(__file__).parents[2]
SOURCE = "alpha"
MADE = ROOT / "examples/quickstart/build/run"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MADE / "scores").exists(), reason="run make quickstart first"),
]


def capture_source(content: dict[str, Any]) -> None:
    """Also on the ranks of a pool, whose directory is another one."""
    with contextlib.chdir(ROOT):
        recipe = make_recipe(content)
        for mode in recipe.modes_with_teacher:
            capture(Context(recipe), SOURCE, mode)


def recipe_of(workdir: Path, source: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """The quickstart's recipe with another workdir, which has the answers and scores, and no captures."""
    given = yaml.safe_load((ROOT / "examples/quickstart/recipe.yaml").read_text())
    content = make_recipe(given).model_dump(mode="json", by_alias=True)
    for name in ("instructions", "responses", "scores"):
        shutil.copytree(MADE / name, workdir / name)
    content["workdir"] = str(workdir)
    content["sources"][SOURCE] |= source
    for name, options in sections.items():
        content[name] |= options
    return content


def dataset_of(content: dict[str, Any]) -> tuple[Recipe, FusionDataset]:
    recipe = make_recipe(content)
    for source in recipe.sources:
        for mode in recipe.modes_with_teacher:
            capture(Context(recipe), source, mode)
    build_fusion_data(Context(recipe))
    return recipe, FusionDataset(recipe)


def compare(one: dict[str, Any], two: dict[str, Any]) -> None:
    (recipe, found), (_, expected) = dataset_of(one), dataset_of(two)
    for mode in recipe.modes_with_teacher:
        compared = compare_fusion_data(found, expected, mode, SOURCE, relative=2 * HALF, absolute=4e-3)
        assert compared.rows > 10_000
        assert compared.at_the_cut <= compared.rows / 1000


def test_a_source_in_megatron(ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(ROOT)
    parallel = {"tensor_model_parallel_size": 2}
    divided = recipe_of(tmp_path / "megatron", {"backend": "megatron", "parallel": parallel})
    ranks(2, capture_source, divided)
    compare(divided, recipe_of(tmp_path / "hf", {}))


def test_a_source_behind_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 1, the only one that a server has, and over the ground truth: the server would sample
    other answers.
    """
    monkeypatch.chdir(ROOT)
    sections: dict[str, Any] = {
        "loss": {"teacher_temperature": 1.0, "student_temperature": 1.0},
        "schedule": {"preset": "fuse", "phases": None},
    }
    with scripted(LocalTeacher(ROOT / "examples/quickstart/build/sources" / SOURCE)) as server:
        served = {"backend": "server", "server": {"url": server.url, "model": "small"}}
        compare(
            recipe_of(tmp_path / "server", served, **sections), recipe_of(tmp_path / "hf", {}, **sections)
        )
