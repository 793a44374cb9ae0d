"""Files of our own stages that are damaged, or of another version, are refused by file, line and key
wherever they are read.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation.results import Metric, Result, load_result
from megatron_fuse.experiments.results import read_results
from megatron_fuse.instructions import example_shards
from megatron_fuse.responses import response_shards
from megatron_fuse.responses.journal import open_journal
from megatron_fuse.scoring.scores import read_shards
from megatron_fuse.sources.completions import Reply
from megatron_fuse.storage import Artifact, Plan, run_plan
from megatron_fuse.training.metrics import MetricsFile, read_metrics

RESULT = asdict(
    Result(
        "alpha",
        "mmlu",
        {"limit": None},
        "/models/alpha",
        "auto",
        1.5,
        128,
        0,
        ["q0", "q1"],
        {"acc,none": Metric(0.5, None, [0.0, None])},
    )
)


def made(directory: Path, files: dict[str, bytes], **counts: int) -> Artifact:
    """A finished artifact whose checksums vouch for these files."""

    def make(_: int, prefix: Path) -> dict[str, int]:
        for name, data in files.items():
            (prefix.parent / name).write_bytes(data)
        return counts

    shards = sorted({name.split(".")[0] for name in files}) or ["shard-00000"]
    artifact = run_plan(Plan(directory, "stage", {}, {}, 1, shards), make)
    assert artifact is not None
    return artifact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": None}, "metrics: "),
        ({"metrics": {"acc,none": {"value": 0.5}}}, "metrics.acc,none.standard_error: missing"),
        (
            {"metrics": {"acc,none": {"value": float("nan"), "standard_error": None, "outcomes": [1, 1]}}},
            "metrics.acc,none.value",
        ),
        (
            {"metrics": {"acc,none": {"value": True, "standard_error": None, "outcomes": [1, 1]}}},
            "metrics.acc,none.value",
        ),
        (
            {"metrics": {"acc,none": {"value": 0.5, "standard_error": None, "outcomes": [1.0]}}},
            "has 1 outcomes for 2 questions",
        ),
        ({"questions": [1, 2]}, "questions.0: "),
        ({"positions": 128.0}, "positions: "),
        ({"added": 1}, "added: "),
    ],
)
def test_a_damaged_result_of_an_evaluation(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mmlu.json"
    path.write_text(json.dumps(RESULT))
    assert asdict(load_result(path)) == RESULT
    path.write_text(json.dumps(RESULT | change))
    with pytest.raises(UserError, match=rf"{path}: .*{message}"):
        load_result(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,1,test,m,nan,5,,,,c,,x,2026-01-01", "value: "),
        ("a,1.5,test,m,0.5,5,,,,c,,x,2026-01-01", "seed: "),
        ("a,,test,m,0.5,5,,,,c,,x,2026-01-01", "seed: "),
        ("a,1,test,m", "value: "),
        ("a,1,test,m,0.5,5,,,,c,,x,2026-01-01,more", "not a row"),
    ],
)
def test_a_damaged_table_of_results(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "results.csv"
    header = "variant,seed,split,metric,value,n,steps,tokens,seconds,commit,data,machine,date"
    path.write_text(f"{header}\na,1,test,m,0.5,5,10,,1.5,c,,x,2026-01-01\n")
    assert [(row.steps, row.tokens, row.seconds, row.data) for row in read_results(path)] == [
        (10, None, 1.5, "")
    ]
    path.write_text(f"{header}\na,1,test,m,0.5,5,,,,c,,x,2026-01-01\n{row}\n")
    with pytest.raises(UserError, match=rf"{path}:3: .*{message}"):
        read_results(path)


STEP = {"kind": "step", "iteration": 1, "phase": "one", "loss": 0.5, "ce/training": None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (STEP | {"ce/training": "x"}, "ce/training: "),
        (STEP | {"iteration": -1}, "iteration: "),
        (STEP | {"iteration": True}, "iteration: "),
        (STEP | {"kind": "other"}, "kind: "),
        ({"kind": "step", "iteration": 1}, "a step must have a phase and a loss"),
        ('{"kind": "step", "iteration": 1, "phase": "one", "loss": NaN}', "loss: "),
    ],
)
def test_damaged_metrics(tmp_path: Path, row: object, message: str) -> None:
    path = write_rows(
        tmp_path / "metrics.jsonl", [STEP, {"kind": "held-out", "iteration": 1, "kl/training": 0.1}]
    )
    assert len(read_metrics(path)) == 2
    write_rows(path, [STEP, row])
    with pytest.raises(UserError, match=rf"{path}:2: .*{message}"):
        read_metrics(path)
    MetricsFile(path, continue_at=1).close()  # as behind a line that a full disk cut off
    assert read_metrics(path) == [STEP]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "request: missing"),
        ('{"request": "b", "text": 5}', "text: "),
        ('{"request": "b", "text": "a", "truncated": 1}', "truncated: "),
        ('{"request": ["b"], "text": "a"}', "request: "),
        ("[" * 100_000, "Invalid JSON"),
    ],
)
def test_a_damaged_journal(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "journal"
    with open_journal(path) as journal:
        journal.add("a", Reply("x", truncated=False))
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=rf"{path}:2: damaged \({message}"), open_journal(path):
        pass
    with open_journal(tmp_path / "own", [tmp_path / "own", path, tmp_path / "removed"]) as journal:
        assert "a" in journal and journal.reply("a").text == "x"  # the whole lines of another process count


@pytest.mark.parametrize(
    ("line", "message"),
    [("{}", "id: missing"), ('{"id": "a", "system": 5}', "system: "), ("[]", "must be an object")],
)
def test_rows_of_stages_that_are_none(tmp_path: Path, line: str, message: str) -> None:
    """Their checksums vouch for them: another version has written them, or somebody by hand."""
    artifact = made(tmp_path / "instructions", {"examples.00000.jsonl": line.encode() + b"\n"}, shards=1)
    with pytest.raises(UserError, match=rf"examples.00000.jsonl:1: {message}"):
        example_shards(artifact)[0]
    artifact = made(tmp_path / "responses", {"shard-00000.jsonl": b'{"id": "a", "response": "x"}\n'})
    with pytest.raises(UserError, match=r"shard-00000.jsonl:1: truncated: missing \(and 1 more\)"):
        response_shards(artifact)[0]


def test_a_count_that_a_manifest_lacks(tmp_path: Path) -> None:
    artifact = made(tmp_path / "instructions", {})
    with pytest.raises(UserError, match=r"instructions/manifest.json: counts.shards is missing"):
        example_shards(artifact)


@pytest.mark.parametrize("data", [b"", b"no array", b"\x93NUMPY\x01\x00\x02\x00{\n", None])
def test_scores_that_are_none(tmp_path: Path, data: bytes | None) -> None:
    if data is None:
        np.save(tmp_path / "objects.npy", np.array(["a", None], object))
        data = (tmp_path / "objects.npy").read_bytes()
    artifact = made(tmp_path / "scores", {"shard-00000.npy": data})
    with pytest.raises(UserError, match=r"shard-00000.npy: not the scores of a shard"):
        read_shards(artifact)
