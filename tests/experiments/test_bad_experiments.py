"""Experiments that cannot be meant, and damaged records of runs, are refused with file, line and key."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.layers import load_experiment
from megatron_fuse.experiments.records import Begun, Evaluation, Made, Owner, Record, read_record
from megatron_fuse.experiments.results import read_results

RECIPE = {
    "workdir": "w",
    "target": {"model": "t"},
    "sources": {"a": {"model": "a"}},
    "data": {"path": "d.jsonl"},
    "schedule": {"preset": "csft"},
}
GOOD: dict[str, Any] = {
    "workdir": "work",
    "results": "results.csv",
    "seeds": [1],
    "evaluate": "python m.py {model} {output} '{{literal}}'",
    "metrics": {"right": "right %"},
    "models": {"m": "m"},
    "variants": {"v": {"schedule": {"preset": "csft"}}},
    "tables": {"main": {"title": "All", "rows": ["m"], "baseline": "m"}},
}


def experiment(directory: Path, **keys: Any) -> Path:
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    path = directory / "experiment.yaml"
    path.write_text(json.dumps({"recipe": str(directory / "recipe.yaml"), **GOOD, **keys}, indent=1))
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prepare": " "}, "prepare: must not be empty"),
        ({"prepare": "''"}, "prepare: must not be empty"),
        ({"prepare": 5}, "prepare: .*valid string"),
        ({"evaluate": ""}, "evaluate: must not be empty"),
        ({"evaluate": "m {model} {output} {"}, "evaluate: Single '{'|evaluate: expected '}'"),
        (
            {"evaluate": "m {model:>99999999999} {output}"},
            "evaluate: the placeholders are .* without a format",
        ),
        ({"evaluate": "m {model!r} {output}"}, "evaluate: the placeholders are"),
        ({"evaluate": "m {model.__class__} {output}"}, "evaluate: the placeholders are"),
        ({"evaluate": "m {} {output}"}, "evaluate: the placeholders are"),
        ({"evaluate": ["m"]}, "evaluate: .*valid string"),
        ({"split": "../up"}, "split: .*pattern"),
        ({"seeds": 5}, "seeds: .*valid list"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"seeds": [-1]}, r"seeds\.0: .*or equal to 0"),
        ({"seeds": [2**32]}, r"seeds\.0: .*less than or equal to"),
        ({"seeds": [True]}, r"seeds\.0: .*valid integer"),
        ({"seeds": ["1"]}, r"seeds\.0: .*valid integer"),
        ({"metrics": ["right"]}, "metrics: must be a mapping"),
        ({"metrics": {}}, "metrics: .*at least 1"),
        ({"metrics": {"a\nb": "x"}}, r"metrics\.a\\nb: .*control characters"),
        ({"models": {"m": 5}}, r"models\.m: "),
        ({"models": {"m": ""}}, r"models\.m: must not be empty"),
        ({"models": {"m": "~nouser/x"}}, r"models\.m: there is no home directory"),
        ({"models": []}, "models: must be a mapping"),
        ({"variants": ["v"]}, "variants: must be a mapping"),
        ({"variants": {"v": 5}}, r"variants\.v: must be a mapping"),
        ({"variants": {"v": {"schedule": 5}}}, r"variants\.v\.schedule: must be a mapping"),
        ({"variants": {"v": {"data": None}}}, r"variants\.v\.data: the key is required"),
        (
            {"variants": {"v": {"training": {"lr": 1e300}}}},
            r"experiment\.yaml:\d+: variants\.v\.training\.lr: ",
        ),
        (
            {"common": {"loss": {"teacher_temperature": 1e300}}},
            r"experiment\.yaml:\d+: common\.loss\.teacher_temperature: ",
        ),
        ({"common": 5}, "common: must be a mapping"),
        ({"merges": {"x": {"method": "slerp", "models": "m"}}}, r"merges\.x\.models: .*valid list"),
        (
            {"merges": {"x": {"method": "slerp", "models": ["m", "v"], "options": {"t": [1]}}}},
            r"merges\.x\.options\.t",
        ),
        (
            {"tables": {"main": {"title": "A", "rows": "m", "baseline": "m"}}},
            r"tables\.main\.rows: .*valid list",
        ),
        (
            {"tables": {"main": {"title": "", "rows": ["m"], "baseline": "m"}}},
            r"tables\.main\.title: must not be empty",
        ),
        (
            {"tables": {"main": {"title": "A", "rows": ["m"], "baseline": "m", "x": {"m": "1"}}}},
            r"tables\.main\.x\.m",
        ),
        ({"tables": {"main": None}}, r"tables\.main: must be a mapping"),
        ({"workdir": ""}, "workdir: must not be empty"),
        ({"results": "a\0b"}, r"experiment\.yaml:\d+: .*holds a NUL"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        ({"preface": {}}, "preface: .*valid string"),
    ],
)
def test_a_bad_experiment_is_one_short_message(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    load_experiment(experiment(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(experiment(tmp_path, **keys))
    assert len(str(caught.value)) <= 600 and ".yaml" in str(caught.value)


def test_an_error_of_the_recipe_is_placed_there(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"training": {"lr": 0}}))
    with pytest.raises(UserError, match=r"recipe\.yaml:\d+: training\.lr: "):
        load_experiment(path)


@pytest.mark.parametrize(
    ("kind", "content", "key"),
    [
        (Owner, {}, "experiment"),
        (Owner, {"experiment": 5}, "experiment"),
        (Begun, {"commit": "c"}, "options"),
        (Begun, {"options": [], "commit": "c"}, "options"),
        (Made, {"options": {}, "data": 5}, "data"),
        (Made, {"options": {}, "steps": "5"}, "steps"),
        (Made, {"options": {}, "training_seconds": None, "tokens": 1.5}, "tokens"),
        (Evaluation, {"command": "c", "commit": "c"}, "metrics"),
        (Evaluation, {"command": "c", "commit": "c", "metrics": {"m": 5}}, r"metrics\.m"),
        (
            Evaluation,
            {"command": "c", "commit": "c", "metrics": {"m": {"value": "1", "n": 1}}},
            r"metrics\.m\.value",
        ),
        (
            Evaluation,
            {"command": "c", "commit": "c", "metrics": {"m": {"value": 1, "n": -1}}},
            r"metrics\.m\.n",
        ),
        (
            Evaluation,
            {"command": "c", "commit": "c", "metrics": {"m": {"value": float("nan"), "n": 1}}},
            r"metrics\.m\.value",
        ),
    ],
)
def test_a_damaged_record_is_named_with_its_key(
    tmp_path: Path, kind: type[Record], content: dict[str, Any], key: str
) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"record\.json: {key}: .*\. Remove .*record\.json and run the experiment again"
    ) as caught:
        read_record(kind, path)
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize(
    "change", [("0.5", "nan"), ("0.5", "x"), ("0.5", ""), ("1,test", "x,test"), ("value", "valu")]
)
def test_a_damaged_csv_is_named(tmp_path: Path, change: tuple[str, str]) -> None:
    path = tmp_path / "results.csv"
    text = (
        "variant,seed,split,metric,value,n,steps,tokens,seconds,commit,data,machine,date\n"
        "m,1,test,right,0.5,10,,,,c,,x,d\n"
    )
    path.write_text(text)
    assert read_results(path)[0].value == 0.5
    path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=r"results\.csv:2: not a row of a file of results"):
        read_results(path)
