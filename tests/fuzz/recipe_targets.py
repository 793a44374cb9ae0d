"""What a run is described by: recipes, experiments, and the table of an experiment's results."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import yaml
from campaign import FuzzTarget

from megatron_fuse.experiments.layers import load_experiment
from megatron_fuse.experiments.report import Reported, write_report
from megatron_fuse.experiments.results import Result, read_results
from megatron_fuse.recipe import dump_recipe, load_recipe

_RECIPE = {
    "seed": 7,
    "workdir": "runs/a",
    "target": {
        "model": "models/target",
        "chat_template": "chatml",
        "system": "Be brief.",
        "trust_remote_code": False,
    },
    "sources": {
        "mpt": {"model": "models/mpt", "dtype": "bf16", "captures": {"training": "mpt.jsonl"}},
        "llama": {
            "model": "models/llama",
            "responses": {"path": "llama.jsonl", "match": "prompt", "prompt": "q"},
        },
        "served": {
            "model": "models/x",
            "server": {"url": "http://host:8000/v1", "model": "x", "extra": {"top_k": 20}},
        },
    },
    "reward_models": {"reward": {"model": "models/reward"}, "given": {"scores": "scores.jsonl"}},
    "data": {
        "path": "data.jsonl",
        "format": "auto",
        "samples": 1000,
        "validation_samples": 10,
        "shard_size": 100,
    },
    "responses": {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 256},
    "capture": {"top_k": 10, "top_p": 0.95, "filter": "full_vocabulary"},
    "alignment": {"vocabulary_map": "exact", "unmatched": "skip"},
    "selection": {
        "inference": "vote",
        "reward_models": ["reward", "given"],
        "strongest": "reward",
        "training": "sum",
    },
    "schedule": {
        "phases": [
            {
                "name": "a",
                "epochs": 1,
                "inference": {"weight": {"from": 1, "to": 0, "shape": "cosine"}, "lambda": 0.5},
            },
            {
                "name": "b",
                "epochs": 2,
                "inference": {"weight": 0.1, "lambda": 0.5},
                "training": {"weight": 1, "lambda": 0.5},
            },
        ]
    },
    "loss": {"teacher_temperature": 2.0},
    "training": {
        "seed": 8,
        "seq_length": 2048,
        "global_batch_size": 128,
        "lr": 2e-5,
        "min_lr": 2e-6,
        "lr_decay_style": "WSD",
        "lr_decay_iters": 900,
        "lr_wsd_decay_iters": 90,
        "lr_warmup_fraction": 0.03,
        "precision": "bf16",
    },
    "parallel": {"tensor_model_parallel_size": 2},
}
_EXPERIMENT = {
    "recipe": "recipe.yaml",
    "workdir": "work",
    "results": "results.csv",
    "seeds": [1, 2],
    "prepare": "python prepare.py",
    "evaluate": "python measure.py --model {model} --output {output} --split {split} --seed {seed}",
    "metrics": {"right": "right %", "fast": "fast"},
    "common": {"loss": {"teacher_temperature": 1.0}},
    "models": {"a": "models/a", "b": "models/b"},
    "variants": {
        "csft": {"schedule": {"preset": "csft", "phases": None}},
        "fuse": {"training": {"lr": 1e-5}},
    },
    "merges": {
        "ties": {"method": "ties", "models": ["csft", "fuse"], "base": "a", "options": {"density": 0.5}}
    },
    "tables": {"main": {"title": "All", "rows": ["a", "csft", "ties"], "baseline": "a", "note": "x"}},
}


def _write(directory: Path) -> None:
    (directory / "recipe.yaml").write_text(yaml.safe_dump(_RECIPE, sort_keys=False))
    (directory / "experiment.yaml").write_text(yaml.safe_dump(_EXPERIMENT, sort_keys=False))


def _load(directory: Path) -> None:
    """What is loaded can be written and loaded again, and is the same."""
    recipe = load_recipe(argv=["--recipe", str(directory / "recipe.yaml")])
    (directory / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(argv=["--recipe", str(directory / "again.yaml")]) == recipe


def _load_experiment(directory: Path) -> None:
    with contextlib.chdir(directory):
        load_experiment(Path("experiment.yaml"))


def _write_results(directory: Path) -> None:
    _write(directory)
    results = [
        Result(
            name,
            seed,
            "test",
            metric,
            10.0 * seed,
            50,
            None,
            None,
            1.5,
            "0123456789",
            "abc",
            "x86, 2 cores",
            "2026-11-01",
        )
        for name in ("a", "csft", "ties")
        for seed in (1, 2)
        for metric in ("right", "fast")
    ]
    rows = [
        [str(value) if value is not None else "" for value in asdict(result).values()] for result in results
    ]
    lines = [",".join(asdict(results[0])), *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    (directory / "results.csv").write_text("\n".join(lines) + "\n")


def _read_results(directory: Path) -> None:
    results = read_results(directory / "results.csv")
    with contextlib.chdir(directory):
        experiment = load_experiment(Path("experiment.yaml"))
        tables = {"main": experiment.tables["main"].model_copy(update={"x": {}})}
        write_report(
            [Reported(experiment.model_copy(update={"tables": tables}), results, "run")], Path("report.md")
        )
    json.dumps([asdict(result) for result in results], allow_nan=False)


TARGETS = [
    FuzzTarget("recipe", _write, _load, ("recipe.yaml",), share=2),
    FuzzTarget(
        "experiment",
        _write,
        _load_experiment,
        names=("cannot be read (No such file", "experiment.yaml: variants."),
    ),
    FuzzTarget("experiment-results", _write_results, _read_results, ("results.csv",), share=0.3),
]
