"""The map of scenarios: its data, its metrics, and that its file fits them."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/skills"))
import evaluate  # noqa: E402
import scenarios  # noqa: E402
import skills  # noqa: E402

from megatron_fuse.experiments.layers import load_experiment, variant_recipe  # noqa: E402


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    right = {skill: {"own": 0.5, "first": 0.25, "second": 1.0} for skill in skills.SKILLS}
    monkeypatch.setattr(scenarios, "accuracies", lambda *_: right)
    (tmp_path / "map").mkdir()
    return tmp_path


def rows_of(directory: Path, name: str) -> list[dict]:
    assert scenarios.write_scenario(directory, name, seed=5) > 0
    return [json.loads(line) for line in (directory / f"map/{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name", ["base", "taught_2", "taught_3", "wrong_30", "examples_120", "examples_1500"]
)
def test_a_scenario_has_its_skills_its_errors_and_enough_rows(written: Path, name: str) -> None:
    scenario, rows = scenarios.SCENARIOS[name], rows_of(written, name)
    counts = Counter(row["category"] for row in rows)
    assert set(counts) == set(scenario.skills) and len(set(counts.values())) == 1
    assert len(rows) >= scenario.examples + scenarios.LEFT_OUT
    assert len({row["instruction"] for row in rows}) > 0.9 * len(rows)
    problems = {row["id"]: row for row in rows}
    assert len(problems) == len(rows)
    right = 0
    for problem, row in zip(scenarios.problems(scenario, seed=5), rows, strict=True):
        assert row["category"] == problem.skill and row["instruction"] == problem.instruction
        assert problem.split == "fusion" and row["accuracy"]["first"] == 0.25
        right += skills.answer_of(row["output"]) == problem.answer
    assert abs(1 - right / len(rows) - scenario.wrong) < 0.06
    if scenario.wrong == 0:
        assert right == len(rows)


def test_the_same_file_is_written_again(written: Path) -> None:
    first = rows_of(written, "wrong_30")
    time = (written / "map/wrong_30.jsonl").stat().st_mtime_ns
    assert rows_of(written, "wrong_30") == first
    assert (written / "map/wrong_30.jsonl").stat().st_mtime_ns == time


def test_learned_and_kept_are_means_over_taught_and_other_skills() -> None:
    generation = {
        name: {"accuracy": 10.0 * n, "standard_error": 3.0, "problems": 4}
        for n, name in enumerate(skills.SKILLS)
    }
    found = evaluate.learned_and_kept(generation, ("addition", "sorting"))
    assert found["learned"] == {"accuracy": 10.0, "standard_error": pytest.approx(3 / 2**0.5), "problems": 8}
    assert found["kept"] == {"accuracy": (10 + 30 + 40 + 50) / 4, "standard_error": 1.5, "problems": 16}
    assert set(evaluate.learned_and_kept(generation, tuple(skills.SKILLS))) == {"learned"}


def test_the_table_gives_what_was_learned_and_what_was_kept() -> None:
    rows = {
        name: {"accuracy": 10.0 * n, "standard_error": 3.0, "problems": 4}
        for n, name in enumerate(skills.SKILLS)
    }
    table = rows | {"mean": evaluate.mean(rows, skills.SKILLS)}
    results = {"fused": dict.fromkeys(evaluate.MEASURES, table)}
    text = evaluate.markdown(results, ["addition", "sorting", "shifting"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text]
    assert cells[0][2:7] == ["learned", "kept", "addition", "sorting", "shifting"]
    assert cells[2][2:] == ["20.0 ± 1.7", "30.0 ± 1.7", "0", "20", "40", "10", "30", "50", "25.0 ± 1.2"]
    assert "learned" not in evaluate.markdown(results)


def test_instructions_teach_the_skills_that_are_asked_for(tmp_path: Path) -> None:
    assert skills.write_instructions(tmp_path / "i.jsonl", 4, 1, ["addition", "sorting"]) == 8
    rows = [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()]
    assert Counter(row["category"] for row in rows) == {"addition": 4, "sorting": 4}


def test_the_map_names_the_scenarios_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(Path("examples/skills/map.yaml"))
    assert list(experiment.scenarios) == list(scenarios.SCENARIOS)
    for name, scenario in scenarios.SCENARIOS.items():
        recipe = variant_recipe(experiment, f"{name}/oracle", 1)
        models = {source: Path(options.model).name for source, options in recipe.sources.items()}
        assert models == dict(scenario.sources)
        assert Path(recipe.target.model) == Path(recipe.sources["own"].model)
        assert recipe.target_as_source == "own"
        assert recipe.data.samples == scenario.examples + recipe.data.validation_samples
        assert recipe.data.validation_samples == scenarios.LEFT_OUT
        assert recipe.voting_reward_models == ["oracle"]
