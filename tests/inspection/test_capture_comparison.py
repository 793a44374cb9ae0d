"""The distance between a capture and the model in process: rounding for the same model, and what a server
adds to its log-probabilities.
"""

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_server import scripted
from local_teacher import LocalTeacher
from small_captures import Models, build_world, changed, fresh_recipe, read
from small_models import save_model

from megatron_fuse.capture import capture
from megatron_fuse.errors import UserError
from megatron_fuse.inspection.captures import compare_capture
from megatron_fuse.recipe import Recipe, ServerOptions, dump_recipe
from megatron_fuse.stages import Context

ROOT = Path(__file__).parents[2]
SOURCE = "beta"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    return build_world(tmp_path_factory.mktemp("compared"))


@pytest.fixture
def recipe(world: tuple[Path, Models], tmp_path: Path) -> Recipe:
    recipe = changed(fresh_recipe(world, tmp_path), loss={"teacher_temperature": 1.0})
    server = ServerOptions(url="http://localhost:1/v1", model="small", max_retries=0)
    source = recipe.sources[SOURCE].model_copy(update={"backend": "server", "server": server})
    return recipe.model_copy(update={"sources": recipe.sources | {SOURCE: source}})


def served(recipe: Recipe, teacher: LocalTeacher, mode: str) -> None:
    with scripted(teacher) as server:
        source = recipe.sources[SOURCE]
        options = ServerOptions(url=server.url, model="small", max_retries=0)
        here = source.model_copy(update={"server": options})
        capture(Context(recipe.model_copy(update={"sources": {SOURCE: here}})), SOURCE, mode)


def less_likely(content: dict[str, Any]) -> None:
    """Every log-probability is 0.25 nats less, as if the server knew another temperature."""
    for position in content["choices"][0]["prompt_logprobs"][1:]:
        for entry in position.values():
            entry["logprob"] -= 0.25


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_the_same_model_differs_by_rounding_and_a_lie_by_what_it_adds(
    recipe: Recipe, world: tuple[Path, Models], mode: str
) -> None:
    teacher = LocalTeacher(world[1][SOURCE])
    served(recipe, teacher, mode)
    found = compare_capture(Context(recipe), SOURCE, mode, 1000)
    shards = read(recipe, SOURCE, mode)
    assert found["rows"] == sum(len(shard.counts) for shard in shards)
    assert found["examples"] == sum(int((shard.status == 0).sum()) for shard in shards)
    assert found["logprobs"] > 2 * found["rows"]
    assert 0 < found["mean"] <= found["p99"] <= found["largest"] < 1e-4 and found["top1_differs"] == 0
    few = compare_capture(Context(recipe), SOURCE, mode, 3)
    assert few["examples"] == 3 and few["rows"] < found["rows"]
    if mode == "training":
        shutil.rmtree(recipe.workdir / "captures")
        teacher.lie = less_likely
        served(recipe, teacher, mode)
        lied = compare_capture(Context(recipe), SOURCE, mode, 1000)
        for key in ("mean", "p99", "largest"):
            np.testing.assert_allclose(lied[key], 0.25, atol=1e-3)
        assert lied["top1_differs"] == 0 and lied["rows"] == found["rows"]


def test_another_model_has_other_likeliest_tokens_and_the_command_prints_the_numbers(
    recipe: Recipe,
    world: tuple[Path, Models],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    other = save_model(tmp_path / "other", "gpt_neox", seed=9, positions=256)
    served(recipe, LocalTeacher(other), "training")
    found = compare_capture(Context(recipe), SOURCE, "training", 5)
    assert found["mean"] > 0.3 and found["top1_differs"] > 0.5
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    command = ["inspect_data", "--recipe", str(tmp_path / "r.yaml"), "--capture", SOURCE]
    monkeypatch.setattr(sys, "argv", [*command, "--mode", "training", "--examples", "5"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/inspect_data.py"), run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"{SOURCE} training: 5 examples, {found['rows']:,} rows" in printed
    assert f"another likeliest token in {100 * found['top1_differs']:.2f} % of the rows" in printed


def test_nothing_to_compare_is_an_error(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="captures/beta/training"):
        compare_capture(Context(recipe), SOURCE, "training", 5)
