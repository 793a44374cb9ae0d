"""Laws of the view of one example: what is printed is what the trainer reads."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from small_fusion import build_world

from megatron_fuse.capture import MODES
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data import MATCHES, FusionDataset
from megatron_fuse.inspection import find_example, format_view, view_document
from megatron_fuse.recipe import Recipe, dump_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """All stages, once for the tests of this file."""
    return build_world(tmp_path_factory.mktemp("fusion"))


@pytest.mark.parametrize("mode", MODES)
def test_a_view_shows_the_distribution_that_predicts_each_token(world: Recipe, mode: str) -> None:
    dataset = FusionDataset(world)
    for number in range(len(dataset.example_ids)):
        view = view_document(world, dataset, mode, number)
        document = dataset.document(mode, number)
        assert list(view) == ["id", "mode", "source", "tokens"]
        assert (view["id"], view["mode"]) == (dataset.example_ids[number], mode)
        assert [token["id"] for token in view["tokens"]] == document.tokens.tolist()
        supervised = [token for token in view["tokens"] if token["supervised"]]
        assert [len(token["entries"]) for token in supervised] == document.counts.tolist()
        assert [entry["id"] for token in supervised for entry in token["entries"]] == document.entry_ids.tolist()
        for token in view["tokens"]:
            assert list(token) == ["id", "text", "supervised", "match", "entries", "tail"]
            assert token["match"] in MATCHES
            assert token["tail"] == pytest.approx(1 - sum(np.exp(entry["logprob"]) for entry in token["entries"]))
            assert -1e-6 <= token["tail"] <= 1
        json.dumps(view)
        text = format_view(view, dataset)
        assert text.count("\n") > len(supervised)


def test_inspect_data_prints_json_and_refuses_with_code_2(
    world: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(world))
    tool = Path(__file__).resolve().parents[1] / "tools" / "inspect_data.py"

    def run(*arguments: str) -> int | None:
        monkeypatch.setattr(sys, "argv", [str(tool), "--recipe", str(path), "--mode", "training", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(tool), run_name="__main__")
        return ended.value.code

    assert run("--id", "e3", "--source", "beta", "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["id"], view["mode"], view["source"]) == ("e3", "training", "beta")
    assert run("--index", "13") == 2
    assert "examples are numbered 0 to 12" in capsys.readouterr().err


def test_find_example(world: Recipe) -> None:
    dataset = FusionDataset(world)
    assert find_example(dataset, None, "e4") == find_example(dataset, 4, None) == 4
    for index, name in ((13, None), (-1, None), (None, "missing")):
        with pytest.raises(UserError, match=r"numbered 0 to 12|there are 13, the first is"):
            find_example(dataset, index, name)
