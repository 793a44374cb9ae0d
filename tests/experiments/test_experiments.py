"""An experiment's file, its runs, its CSV and its report; models only, measured by a script of the test's
own.
"""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_models import small_recipe

from megatron_fuse.errors import UserError
from megatron_fuse.experiments import runs as runs_module
from megatron_fuse.experiments.experiment import Experiment
from megatron_fuse.experiments.layers import laid_over, load_experiment, variant_recipe
from megatron_fuse.experiments.report import Reported, write_report
from megatron_fuse.experiments.results import (
    collect_results,
    earlier_results,
    options_hash,
    read_results,
    write_results,
)
from megatron_fuse.experiments.runner import run_experiment
from megatron_fuse.experiments.runs import Run
from megatron_fuse.recipe import dump_recipe

# Value 10 * letters of the model's name + seed, and a little more for odd seeds. Counts its calls. Fails if
# there is a file "broken".
MEASURE = """
import json, sys
from pathlib import Path
model, output, split, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with open(model.parent / "calls.txt", "a") as file:
    file.write(f"{model.name} {seed} {split}\\n")
if (model / "broken").exists():
    sys.exit("no such skill")
value = 10 * len(model.name) + seed + seed % 2 * len(model.name) / 1000  # differences vary a little
found = {"right": {"value": value, "n": 50}}
if model.name != "bb":
    found["fast"] = {"value": 1.0, "n": 7}
output.write_text(json.dumps(found))
"""


@pytest.fixture
def experiment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("megatron_fuse.experiments.fork_server.LIBRARIES", ())  # which nothing here needs
    (tmp_path / "measure.py").write_text(MEASURE)
    for name in ("a", "bb", "cccc"):
        (tmp_path / name).mkdir()
    recipe = small_recipe(tmp_path, tmp_path / "data.jsonl", tmp_path / "a", {"one": tmp_path / "a"})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    content = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "workdir": str(tmp_path / "work"),
        "results": str(tmp_path / "docs/results.csv"),
        "seeds": [1, 2],
        "evaluate": f"python {tmp_path / 'measure.py'} {{model}} {{output}} {{split}} {{seed}}",
        "metrics": {"right": "right %", "fast": "fast"},
        "models": {name: str(tmp_path / name) for name in ("a", "bb", "cccc")},
        "variants": {"csft": {"schedule": {"preset": "csft"}}},
        "tables": {
            "main": {"title": "All", "rows": ["a", "bb"], "baseline": "a"},
            "more": {"title": "More", "rows": ["a", "cccc"], "baseline": "a", "x": {"a": 1, "cccc": 4}},
        },
    }
    return write(tmp_path / "experiment.yaml", content)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def changed(path: Path, **keys: Any) -> Path:
    return write(path, yaml.safe_load(path.read_text()) | keys)


def run(path: Path, **options: Any) -> tuple[Experiment, list[str], list[str]]:
    """The experiment, the failures, and the calls of the script since the last run."""
    experiment = load_experiment(path)
    calls = path.parent / "calls.txt"
    calls.write_text("")
    failed = run_experiment(experiment, path, **options)
    return experiment, failed, sorted(calls.read_text().splitlines())


def test_only_what_is_missing_runs(experiment_file: Path) -> None:
    experiment, failed, calls = run(experiment_file)
    assert failed == [] and calls == ["a 1 test", "a 2 test", "bb 1 test", "bb 2 test"]
    assert run(experiment_file)[2] == []
    assert run(changed(experiment_file, seeds=[1, 2, 5]))[2] == ["a 5 test", "bb 5 test"]
    assert run(experiment_file, tables=["more"])[2] == ["cccc 1 test", "cccc 2 test", "cccc 5 test"]
    assert run(experiment_file, split="dev")[2] == [
        f"{name} {seed} dev" for name in ("a", "bb") for seed in (1, 2, 5)
    ]
    experiment = load_experiment(experiment_file)
    results = collect_results(experiment, "test")
    assert {(r.variant, r.seed): r.value for r in results if r.metric == "right"} == {
        (name, seed): 10 * len(name) + seed + seed % 2 * len(name) / 1000
        for name in ("a", "bb", "cccc")
        for seed in (1, 2, 5)
    }


def test_an_experiment_continues_from_its_csv_alone(experiment_file: Path) -> None:
    experiment, *_ = run(experiment_file)
    write_results(experiment, collect_results(experiment, "test"), "test")
    shutil.rmtree(experiment.workdir)
    assert run(experiment_file, skip_measured=True)[2] == []
    assert run(experiment_file, skip_measured=True, split="dev")[2] == [
        f"{name} {seed} dev" for name in ("a", "bb") for seed in (1, 2)
    ]
    assert run(experiment_file)[2] == ["a 1 test", "a 2 test", "bb 1 test", "bb 2 test"]


@pytest.mark.parametrize(
    "column, value",
    [("commit", "0123456789"), ("options", "0123456789ab"), ("options", "")],
    ids=["other commit", "other options", "options unknown"],
)
def test_results_of_other_code_or_options_do_not_count(
    experiment_file: Path, column: str, value: str
) -> None:
    experiment, *_ = run(experiment_file)
    write_results(experiment, collect_results(experiment, "test"), "test")
    shutil.rmtree(experiment.workdir)
    with experiment.results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["variant"] == "bb" and row["seed"] == "2":
            row[column] = value
    with experiment.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert run(experiment_file, skip_measured=True)[2] == ["bb 2 test"]


def test_a_recipe_that_changes_in_the_meantime_makes_other_runs(experiment_file: Path) -> None:
    run = Run(load_experiment(experiment_file), "csft", 1)
    before = options_hash(run)
    assert options_hash(run) == before
    recipe = experiment_file.parent / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\n")
    assert options_hash(run) == before
    changed(recipe, seed=9, training=yaml.safe_load(recipe.read_text())["training"] | {"lr": 0.125})
    assert options_hash(run) != before


def test_results_of_another_measuring_command_do_not_count(experiment_file: Path) -> None:
    experiment, *_ = run(experiment_file)
    write_results(experiment, collect_results(experiment, "test"), "test")
    shutil.rmtree(experiment.workdir)
    other = changed(experiment_file, evaluate=f"{experiment.evaluate} another")
    assert len(run(other, skip_measured=True)[2]) == 4


def test_the_csv_keeps_other_splits_and_reads_back(experiment_file: Path) -> None:
    experiment, *_ = run(experiment_file)
    run(experiment_file, split="dev")
    for split in ("test", "dev", "dev"):
        assert write_results(experiment, collect_results(experiment, split), split) == []
    found = read_results(experiment.results)
    assert found == collect_results(experiment, "test") + collect_results(experiment, "dev")
    experiment.results.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a row of a file of results"):
        read_results(experiment.results)


def test_the_report_tells_differences_ties_and_gaps(experiment_file: Path, tmp_path: Path) -> None:
    experiment, *_ = run(experiment_file)
    path = tmp_path / "docs/RESULTS.md"
    write_report(
        [Reported(experiment, collect_results(experiment, "test"), "megatron-fuse experiments E")], path
    )
    assert "## More" not in path.read_text() and "- More (`--only more`): cccc" in path.read_text()
    run(experiment_file, tables=["more"])
    write_report(
        [Reported(experiment, collect_results(experiment, "test"), "megatron-fuse experiments E")], path
    )
    text = path.read_text()
    assert "| bb | – | 21.5 ± 0.5 (+10.0 ± 0.0)▲ |" in text and "–: not measured (bb)." in text
    assert "Clearly above a: bb (+10.0)." in text and "## More" in text and "(results-main.png)" in text
    assert (
        "--only main`; seeds 1, 2; split test" in text
        and (tmp_path / "docs/results-more.png").stat().st_size > 1000
    )


def test_a_crash_leaves_the_others_and_says_where(experiment_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a/broken").touch()
    experiment, failed, _ = run(experiment_file)
    assert len(failed) == 2 and all(
        "a, seed" in text and "no such skill" in text and "log.txt" in text for text in failed
    )
    assert {result.variant for result in collect_results(experiment, "test")} == {"bb"}
    (tmp_path / "a/broken").unlink()
    assert run(experiment_file)[1:] == ([], ["a 1 test", "a 2 test"])


def test_results_of_another_commit_or_data_are_refused(
    experiment_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, *_ = run(experiment_file)
    path = Run(experiment, "a", 1).directory / "result.json"
    made = json.loads(path.read_text())
    for name, data in (("a", "d1"), ("bb", "d2")):
        of = Run(experiment, name, 1).directory / "result.json"
        of.write_text(json.dumps(json.loads(of.read_text()) | {"data": data}))
    with pytest.raises(UserError, match=r"bb.*was trained on data d2, but .*a.* on d1"):
        collect_results(experiment, "test")
    path.write_text(json.dumps(made))
    monkeypatch.setattr(runs_module, "code_version", lambda: "0123456789")
    monkeypatch.setattr("megatron_fuse.experiments.results.code_version", lambda: "0123456789")
    with pytest.raises(
        UserError,
        match=r"4 runs of commit .* for example a \(seed 1\), but the current commit is 0123456789\. Check "
        r"out",
    ):
        run(experiment_file)


def test_what_another_command_measured_is_measured_anew(experiment_file: Path) -> None:
    run(experiment_file)
    command = yaml.safe_load(experiment_file.read_text())["evaluate"] + " --twice"
    assert run(changed(experiment_file, evaluate=command))[2] == [
        "a 1 test",
        "a 2 test",
        "bb 1 test",
        "bb 2 test",
    ]


def test_code_that_changes_under_a_run_makes_no_result(
    experiment_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fuse.experiments.runner.code_version", lambda: "before")
    monkeypatch.setattr(runs_module, "code_version", lambda: "after")
    experiment, failed, _ = run(experiment_file)
    assert (
        len(failed) == 4
        and "the commit was before at the start of the run and is after now. Check out before" in failed[0]
    )
    assert not Run(experiment, "a", 1).is_made()


def test_the_csv_keeps_what_was_run_elsewhere_by_the_same_code(experiment_file: Path) -> None:
    experiment, *_ = run(experiment_file)
    found = collect_results(experiment, "test")
    kept = [
        replace(row, variant="cccc", options=options_hash(Run(experiment, "cccc", row.seed)))
        for row in found
        if row.variant == "a"
    ]
    csft = [replace(row, variant="csft") for row in kept]
    lost = [replace(csft[0], commit="another"), *(replace(row, options="0123456789ab") for row in csft[1:])]
    experiment.results.parent.mkdir()
    assert write_results(experiment, kept + lost + found, "test") == []
    assert (
        write_results(experiment, [], "test") == []
        and read_results(experiment.results) == found + kept + lost
    )
    assert write_results(experiment, found, "test") == ["csft"]
    assert read_results(experiment.results) == found + kept
    assert read_results(earlier_results(experiment)) == lost


def test_rows_of_another_version_are_set_aside_once(experiment_file: Path) -> None:
    """Also those of runs that are measured again. Rows that the same code measures again are dropped."""
    experiment, *_ = run(experiment_file)
    found = collect_results(experiment, "test")
    before = [replace(row, commit="before") for row in found]
    for rows in (before, found, [replace(row, date="2026-01-01") for row in found]):
        write_results(experiment, rows, "test")
    assert read_results(earlier_results(experiment)) == before
    for rows in (before, found):
        write_results(experiment, rows, "test")
    assert read_results(experiment.results) == found
    assert read_results(earlier_results(experiment)) == [
        *before, *(replace(row, date="2026-01-01") for row in found)
    ]  # fmt: skip


def test_an_unfinished_run_of_other_code_or_options_is_refused(experiment_file: Path) -> None:
    experiment, *_ = run(experiment_file)
    for seed, change in ((1, {"commit": "0123456789"}), (2, {"options": {"model": "elsewhere"}})):
        directory = Run(experiment, "a", seed).directory
        (directory / "result.json").unlink()
        begun = json.loads((directory / "begun.json").read_text())
        (directory / "begun.json").write_text(json.dumps(begun | change))
    _, failed, calls = run(experiment_file)
    of_commit, of_options = sorted(failed)
    assert "seed-1 holds a run of commit 0123456789, but the current commit is" in of_commit
    assert (
        "seed-2 holds a run with other options than a has now. Remove the directory" in of_options
        and calls == []
    )


def test_a_workdir_has_one_experiment_and_a_run_one_meaning(experiment_file: Path, tmp_path: Path) -> None:
    run(experiment_file)
    other = write(tmp_path / "other.yaml", yaml.safe_load(experiment_file.read_text()))
    with pytest.raises(UserError, match=r"belongs to the experiment .*experiment.yaml, not to .*other.yaml"):
        run(other)
    models = yaml.safe_load(experiment_file.read_text())["models"] | {"a": str(tmp_path / "cccc")}
    with pytest.raises(
        UserError, match=r"holds a run with other options than a has now\. Remove the directory"
    ):
        run(changed(experiment_file, models=models, seeds=[1, 2, 3]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"tables": {"main": {"title": "All", "rows": ["a", "b"], "baseline": "a"}}},
            "tables.main: b is not the name of a variant, .* Choose",
        ),
        (
            {"variants": {"x": {"schedule": {"preset": "cfst"}}}},
            r"experiment.yaml:\d+: variants.x.schedule.preset: .*'csft'",
        ),
        (
            {"variants": {"x": {"training": {"lrr": 1}}}},
            r"experiment.yaml:\d+: variants.x.training.lrr: unknown key; allowed here: .*lr",
        ),
        ({"variants": {"x": {"seed": 1}}}, "variants.x sets seed, but the runner sets this"),
        ({"variants": {"x": {"training": {"save": "y"}}}}, "variants.x sets training.save"),
        ({"common": {"export": {"path": "y"}}}, "common sets export.path"),
        ({"variants": {"a": {}}}, "a: the name is used twice"),
        ({"evaluate": "python m.py {model}"}, r"evaluate: the placeholders are \['model'\]"),
        ({"evaluate": "python m.py {model} {output} {where}"}, "evaluate: the placeholders are .*where"),
        (
            {"merges": {"m": {"method": "slerp", "models": ["a", "d"]}}},
            "merges.m: d is not the name of a variant or model",
        ),
        ({"seeds": [1, 1]}, "seeds contains a seed twice"),
        ({"prepare": "python 'make.py"}, "prepare: not a command line: No closing quotation"),
        ({"sedes": [1]}, "sedes: unknown key; allowed here: .*seeds"),
    ],
)
def test_what_cannot_be_run_is_refused(experiment_file: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_experiment(changed(experiment_file, **keys))


def test_a_seed_may_name_models_and_data_of_its_own(experiment_file: Path, tmp_path: Path) -> None:
    common = {
        "sources": {"one": None, "two": {"model": f"{tmp_path}/set-{{seed}}"}},
        "data": {"path": "{seed}.jsonl"},
    }
    prepare = f"python -c \"import os; os.makedirs('{tmp_path}/set-{{seed}}')\""
    keys = {"common": common, "prepare": prepare, "models": {"a": f"{tmp_path}/set-{{seed}}"}}
    tables = {"main": {"title": "All", "rows": ["a"], "baseline": "a"}}
    experiment, failed, calls = run(changed(experiment_file, **keys, tables=tables))
    recipe = variant_recipe(experiment, "csft", 2)
    assert {name: source.model for name, source in recipe.sources.items()} == {"two": f"{tmp_path}/set-2"}
    assert recipe.data.path == Path("2.jsonl") and failed == [] and calls == ["set-1 1 test", "set-2 2 test"]


def test_a_command_that_cannot_be_started_is_named(experiment_file: Path) -> None:
    command = yaml.safe_load(experiment_file.read_text())["evaluate"].replace("python", "pyhton")
    _, failed, _ = run(changed(experiment_file, evaluate=command))
    assert (
        len(failed) == 4
        and failed[0] == "pyhton cannot be started: the program does not exist or is not executable"
    )
    with pytest.raises(UserError, match="--jobs must be from 1 to 1024, not 0"):
        run(experiment_file, jobs=0)


def test_an_unknown_table_is_refused(experiment_file: Path) -> None:
    with pytest.raises(UserError, match=r"mian is not a table of this experiment\. Choose from main, more"):
        run(experiment_file, tables=["mian"])


def test_variants_share_the_data_of_a_seed_and_nothing_else(experiment_file: Path) -> None:
    experiment = load_experiment(
        changed(experiment_file, variants={"x": {"schedule": {"preset": "fuse"}}, "y": {}})
    )
    x, y, later = (variant_recipe(experiment, name, seed) for name, seed in (("x", 1), ("y", 1), ("y", 2)))
    assert x.workdir == y.workdir != later.workdir and (x.seed, later.seed) == (1, 2)
    assert (
        len(
            {recipe.training.save for recipe in (x, y, later)}
            | {recipe.export.path for recipe in (x, y, later)}
        )
        == 6
    )
    assert x.phases[0].name == "fuse"


def test_options_are_laid_over_key_by_key() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert laid_over(base, {"a": {"c": [5], "e": {"f": 1}}, "d": None}) == {
        "a": {"b": 1, "c": [5], "e": {"f": 1}}
    }
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 3}
