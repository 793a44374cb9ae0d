"""Laws of the view of one example: what is printed is what the trainer reads."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_fuse.alignment import MATCHES
from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.inspection.documents import find_example, format_view, view_document
from megatron_fuse.recipe import MODES, Recipe, dump_recipe


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
        assert [
            entry["id"] for token in supervised for entry in token["entries"]
        ] == document.teacher_ids.tolist()
        for token in view["tokens"]:
            assert list(token) == ["id", "text", "supervised", "match", "entries", "tail"]
            assert token["match"] in MATCHES
            assert token["tail"] == pytest.approx(
                1 - sum(np.exp(entry["logprob"]) for entry in token["entries"])
            )
            assert -1e-6 <= token["tail"] <= 1
        json.dumps(view)
        text = format_view(view, dataset)
        assert text.count("\n") > len(supervised)


def test_the_text_form_shows_what_is_learned_and_every_label(world: Recipe) -> None:
    dataset = FusionDataset(world)
    for number in range(len(dataset.example_ids)):
        view = view_document(world, dataset, "training", number)
        text = format_view(view, dataset)
        learned = [token["text"] for token in view["tokens"] if token["supervised"]]
        assert f"[learned] {'│'.join(learned)}" in text
        table = text.split("in per cent\n")[1].splitlines()
        shown = [token for token in view["tokens"] if token["supervised"]]
        assert len(table) == len(shown)
        for line, token in zip(table, shown, strict=True):
            assert repr(token["text"]) in line
            assert token["match"] in line
            assert all(repr(entry["text"]) in line for entry in token["entries"])


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | str | None]:
    """Runs tools/inspect_data.py with these arguments in this process; its exit code."""
    path = Path(__file__).resolve().parents[2] / "tools" / "inspect_data.py"

    def run(*arguments: object) -> int | str | None:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        return ended.value.code

    return run


def test_inspect_data_prints_json_and_refuses_with_code_2(
    world: Recipe, tmp_path: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(world))
    way = ("--recipe", path, "--mode", "training")
    assert tool(*way, "--id", "e3", "--source", "beta", "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["id"], view["mode"], view["source"]) == ("e3", "training", "beta")
    assert tool(*way, "--index", "13") == 2
    assert "Examples are numbered from 0 to 12" in capsys.readouterr().err
    assert tool("--recipe", path, "--index", "3") == 2
    assert "--mode is missing. It is needed" in capsys.readouterr().err


def test_the_fusion_directory_is_enough_wherever_it_lies(
    world: Recipe,
    tmp_path: Path,
    tool: Callable,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    what = ("--index", "3", "--mode", "inference", "--json")
    assert tool(fusion_directory(world), *what) == 0
    expected = capsys.readouterr().out
    moved = tmp_path / "elsewhere" / "fusion" / "exact-skip-T2"
    shutil.copytree(fusion_directory(world), moved)
    assert tool(moved, *what) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.chdir(moved)
    assert tool(".", *what) == 0
    assert capsys.readouterr().out == expected


def test_what_is_no_fusion_directory_is_refused(
    world: Recipe, tmp_path: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    what = ("--index", "3", "--mode", "training")
    renamed = tmp_path / "fusion" / "exact-skip-T3"
    shutil.copytree(fusion_directory(world), renamed)
    for arguments, said in (
        (what, "Give the fusion directory"),
        ((renamed, "--recipe", renamed / "recipe.yaml", *what), "Give the fusion directory"),
        ((tmp_path, *what), "recipe.yaml is missing. Name a directory WORKDIR/fusion/MAP-UNMATCHED-T"),
        (("/", *what), "recipe.yaml is missing. Name a directory WORKDIR/fusion/MAP-UNMATCHED-T"),
        ((renamed, *what), "describes exact-skip-T2, not exact-skip-T3"),
    ):
        assert tool(*arguments) == 2
        assert said in capsys.readouterr().err


def test_find_example(world: Recipe) -> None:
    dataset = FusionDataset(world)
    assert find_example(dataset, None, "e4") == find_example(dataset, 4, None) == 4
    for index, name in ((13, None), (-1, None), (None, "missing")):
        with pytest.raises(UserError, match=r"numbered from 0 to 12|There are 13 examples; the first is"):
            find_example(dataset, index, name)
