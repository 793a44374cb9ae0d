"""The same variants under several scenarios: their names, directories, data, results and maps."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_models import small_recipe

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.experiment import Experiment
from megatron_fuse.experiments.layers import load_experiment, variant_recipe
from megatron_fuse.experiments.numbers import with_quotes
from megatron_fuse.experiments.report import Reported, write_report
from megatron_fuse.experiments.results import collect_results, read_results, write_results
from megatron_fuse.experiments.runner import run_experiment
from megatron_fuse.recipe import dump_recipe

# 10 * letters of the model's name + seed, and 100 more for "aaa" under `hard`.
MEASURE = """
import json, sys
import re
from pathlib import Path
model, output, seed, scenario = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
letters = len(model.name)
value = 10 * letters + seed + 100 * (scenario == "hard" and model.name == "aaa") + seed % 2 * letters / 10
output.write_text(json.dumps({"right": {"value": value, "n": 50}}))
"""


@pytest.fixture
def experiment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("megatron_fuse.experiments.fork_server.LIBRARIES", ())  # which nothing here needs
    (tmp_path / "measure.py").write_text(MEASURE)
    for name in ("a", "bb", "aaa"):
        (tmp_path / name).mkdir()
    recipe = small_recipe(tmp_path, tmp_path / "data.jsonl", tmp_path / "a", {"one": tmp_path / "a"})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    content = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "workdir": str(tmp_path / "work"),
        "results": str(tmp_path / "docs/results.csv"),
        "seeds": [1, 2, 3],
        "evaluate": f"python {tmp_path / 'measure.py'} {{model}} {{output}} {{seed}} {{scenario}}",
        "metrics": {"right": "right %"},
        "models": {name: str(tmp_path / name) for name in ("a", "bb", "aaa")},
        "variants": {"x": {"schedule": {"preset": "csft"}}, "y": {"training": {"lr": 0.5}}},
        "scenarios": {
            "easy": {},
            "hard": {"data": {"path": "{scenario}-{seed}.jsonl"}, "training": {"lr": 0.25}},
        },
        "tables": {"easy": {"title": "Easy", "scenario": "easy", "rows": ["a", "bb"], "baseline": "a"}},
        "maps": {
            "all": {"title": "All", "scenarios": ["easy", "hard"], "rows": ["bb", "aaa"], "baseline": "a"}
        },
    }
    return write(tmp_path / "experiment.yaml", content)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def made(path: Path, *tables: str) -> Experiment:
    experiment = load_experiment(path)
    assert run_experiment(experiment, path, tables=list(tables)) == []
    return experiment


def test_a_scenario_lies_between_the_recipe_and_the_variant(experiment_file: Path) -> None:
    experiment = load_experiment(experiment_file)
    recipes = {name: variant_recipe(experiment, name, 2) for name in ("easy/x", "hard/x", "hard/y")}
    assert [recipes[name].training.lr for name in ("hard/x", "hard/y")] == [0.25, 0.5]
    assert recipes["hard/x"].data.path == Path("hard-2.jsonl")
    assert recipes["hard/x"].workdir == recipes["hard/y"].workdir == experiment.workdir / "data/hard/seed-2"
    assert recipes["easy/x"].workdir == experiment.workdir / "data/easy/seed-2"
    assert len({recipe.training.save for recipe in recipes.values()}) == 3


def test_only_the_scenarios_that_are_shown_run(experiment_file: Path) -> None:
    experiment = made(experiment_file, "easy")
    found = collect_results(experiment, "test")
    assert {result.variant for result in found} == {"easy/a", "easy/bb"}
    made(experiment_file, "all")
    found = collect_results(experiment, "test")
    assert {result.variant for result in found} == {
        f"{c}/{n}" for c in ("easy", "hard") for n in ("a", "bb", "aaa")
    }
    assert write_results(experiment, found, "test") == [] and read_results(experiment.results) == found


def test_a_map_shows_the_differences_under_every_scenario(experiment_file: Path, tmp_path: Path) -> None:
    experiment = made(experiment_file, "easy", "all")
    path = tmp_path / "docs/RESULTS.md"
    write_report(
        [Reported(experiment, collect_results(experiment, "test"), "megatron-fuse experiments E")], path
    )
    text = path.read_text()
    lines = {
        line.split(" | ")[0].strip("| "): line
        for line in text.partition("## All")[2].splitlines()
        if " | " in line
    }
    assert "+10.1" in lines["easy"] and "+120.1" in lines["hard"] and lines["hard"].count("▲") == 2
    assert "12.1 ± 0.6" in lines["easy"], "the mean of the baseline a"
    assert "--only all`; seeds 1, 2, 3" in text and "found in 80 %" in text
    assert (tmp_path / "docs/results-all.png").stat().st_size > 1000


def test_prose_quotes_the_cells_of_a_map(experiment_file: Path) -> None:
    experiment = made(experiment_file, "easy")
    values: dict[str, dict[str, dict[int, float]]] = {}
    for result in collect_results(experiment, "test"):
        values.setdefault(result.variant, {}).setdefault(result.metric, {})[result.seed] = result.value
    (metric,) = experiment.metrics
    text = f"gains [[easy {metric} easy/bb]] over [[easy {metric} easy/a]]; [[all {metric} hard/bb]]"
    assert re.fullmatch(
        r"gains \+10\.1 ± \d\.\d▲? over 12\.1 ± 0\.6; \(not measured\)", with_quotes(text, experiment, values)
    )
    for wrong, message in (
        (f"[[odd {metric} easy/a]]", "quotes no number. Write .* map of easy, all"),
        ("[[easy odd easy/a]]", f"a metric of {metric}"),
        (f"[[easy {metric}]]", "quotes no number"),
        (f"[[easy {metric} hard/a]]", "easy has no run hard/a. It has easy/a, easy/bb"),
    ):
        with pytest.raises(UserError, match=message):
            with_quotes(wrong, experiment, values)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"tables": {"t": {"title": "T", "rows": ["a"], "baseline": "a"}}},
            "tables.t: set scenario to one of easy, hard",
        ),
        (
            {"maps": {"m": {"title": "M", "scenarios": ["soft"], "rows": ["a"], "baseline": "a"}}},
            "maps.m: soft is not the name of a scenario",
        ),
        (
            {"scenarios": {}, "maps": {}, "tables": {"t": {"title": "T", "rows": ["a"], "baseline": "a"}}},
            r"has \{scenario\}, but there are no scenarios",
        ),
        ({"scenarios": {"easy": {"seed": 3}, "hard": {}}}, "scenarios.easy sets seed"),
        ({"scenarios": {"easy": {}, "hard": {"training": {"lrr": 1}}}}, "training.lrr: unknown key"),
        ({"tables": {}, "maps": {}}, "there is no table"),
        (
            {"maps": {"easy": {"title": "M", "scenarios": ["easy"], "rows": ["a"], "baseline": "a"}}},
            "easy: the name is used in tables and in maps",
        ),
        (
            {
                "tables": {
                    "t": {
                        "title": "T",
                        "scenario": "easy",
                        "rows": ["a"],
                        "baseline": "a",
                        "expected": ["bb"],
                    }
                }
            },
            "tables.t.expected: bb is not a row",
        ),
    ],
)
def test_what_does_not_fit_is_refused(experiment_file: Path, keys: dict[str, Any], message: str) -> None:
    path = write(experiment_file, yaml.safe_load(experiment_file.read_text()) | keys)
    with pytest.raises(UserError, match=message):
        load_experiment(path)
