"""The command plans a recipe of which nothing exists but the models' config.json."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from small_models import write_rows

from megatron_fuse.cli.main import program

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "scaling" / "models"
TOKENS = ["--prompt-tokens", "200", "--response-tokens", "300"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """One source of 7B, of which only config.json exists, into a target of its sizes."""
    model = tmp_path / "model"
    shutil.copytree(MODELS / "llama-2-7b", model)
    content = {
        "workdir": str(tmp_path / "run"),
        "target": {"model": str(model)},
        "sources": {"llama": {"model": str(model)}},
        "data": {"path": str(tmp_path / "rows.jsonl"), "samples": 10_000},
        "schedule": {"preset": "fuse"},
        "parallel": {"use_distributed_optimizer": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def planned(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    command: tuple[str, ...] = ("plan",),
) -> tuple[int, str]:
    """Exit code, and what was printed; of an error what it says."""
    monkeypatch.setattr(sys, "argv", ["megatron-fuse", *command, "--recipe", str(recipe), *options])
    with pytest.raises(SystemExit) as ended:
        sys.exit(program())
    printed = capsys.readouterr()
    code = ended.value.code
    return (code, printed.err) if code else (0, printed.out)


def test_a_plan_needs_configs_alone(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan = planned(recipe, monkeypatch, capsys, "--gpus", "8xA100-80", *TOKENS)
    assert code == 0, plan
    assert "Plan for 8 x A100-80: an estimate from sizes and rates. Nothing was run." in plan
    assert "10,000 examples with 200 + 300 tokens" in plan and "6.74 B" in plan
    assert re.search(r"captures/llama/training +8 x hf, 1 GPU +[\d.]+ GB +yes ", plan)
    assert "assumed: 0.40 of 312 TFLOP/s" in plan
    assert not (recipe.parent / "run").exists()
    same = planned(recipe, monkeypatch, capsys, "--gpus", "8xA100-80", *TOKENS, command=("run", "--plan"))
    assert same == (0, plan)


def test_rows_of_a_file_are_counted_without_a_tokenizer(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "a" * 400, "output": "b" * 800}] * 30
    write_rows(recipe.parent / "rows.jsonl", [{"id": str(index), **row} for index, row in enumerate(rows)])
    code, plan = planned(recipe, monkeypatch, capsys, "--gpus", "8xA100-80")
    assert code == 0, plan
    assert "30 examples with 100 + 200 tokens" in plan


def test_a_training_that_does_not_fit_gets_the_smallest_change(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gpus", "8xA100-80", *TOKENS, "--no-use-distributed-optimizer"]
    code, plan = planned(recipe, monkeypatch, capsys, *options)
    assert code == 0, plan
    (own,) = [line for line in plan.splitlines() if line.startswith("  the recipe")]
    (change,) = [line for line in plan.splitlines() if line.startswith("  smallest change that fits: ")]
    assert " NO " in own and "," not in change  # 16 bytes a parameter are 108 GB; one option is enough
    code, small = planned(recipe, monkeypatch, capsys, "--gpus", "RTX4090-24", *TOKENS)
    assert code == 0 and "NOT EVERY STAGE FITS" in small and "nothing that was tried fits" in small


@pytest.mark.parametrize(
    ("tensor", "pipeline", "said"),
    [(2, 2, r"captures/llama/training +2 x megatron, TP 2 x PP 2 "), (3, 1, "needs a multiple of 3 GPUs")],
)
def test_the_layout_of_a_source_is_that_of_the_recipe(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tensor: int,
    pipeline: int,
    said: str,
) -> None:
    content = yaml.safe_load(recipe.read_text())
    parallel = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    content["sources"]["llama"] |= {"backend": "megatron", "parallel": parallel}
    recipe.write_text(yaml.safe_dump(content))
    _, plan = planned(recipe, monkeypatch, capsys, "--gpus", "8xA100-80", *TOKENS)
    assert re.search(said, plan), plan


def test_a_server_of_the_recipe_captures(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(recipe.read_text())
    server = {"url": "http://localhost:8000/v1", "model": "llama"}
    content["sources"]["llama"] |= {"backend": "server", "server": server}
    content["loss"] = {"teacher_temperature": 1.0}
    recipe.write_text(yaml.safe_dump(content))
    _, plan = planned(recipe, monkeypatch, capsys, "--gpus", "8xA100-80", *TOKENS)
    assert re.search(r"captures/llama/training +8 x server, TP 1 ", plan), plan
    assert "captures at 0.5 of the forward pass's rate" in plan


def test_measured_rates_take_the_place_of_assumed_ones(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rates = tmp_path / "checks.jsonl"
    rows = [
        {"check": "machine", "what": "device", "value": "NVIDIA A100", "unit": ""},
        {"check": "training", "what": "local: fusion: rate", "value": 62.4, "unit": "TFLOP/s"},
        {"check": "training", "what": "local: fusion, packed: rate", "value": 500.0, "unit": "TFLOP/s"},
    ]
    rates.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--gpus", "8xA100-80", *TOKENS, "--packing"]
    training = []
    for more in ([], ["--rates", str(rates)]):
        code, plan = planned(recipe, monkeypatch, capsys, *options, *more)
        assert code == 0, plan
        training += [line for line in plan.splitlines() if line.startswith("  training step:")]
        training += [line.split() for line in plan.splitlines() if line.startswith("  training ")][:1]
    assert training[2] == "  training step: measured on NVIDIA A100: 62.4 TFLOP/s"
    assert training[1] != training[3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "8xH100"], "The GPUs are A100-40"),
        (["--gpus", "8xA100-80", "--nodes", "0"], "--nodes is 0"),
        (["--gpus", "8xA100-80", "--prompt-tokens", "5"], "belong together"),
        (["--gpus", "8xA100-80", "--prompt-tokens", "0", "--response-tokens", "5"], "from 1 to 10 million"),
        (["--prompt-tokens", "5", "--response-tokens", "5"], "--prompt-tokens needs --gpus"),
        (["--nodes", "4"], "--nodes needs --gpus"),
        (["--gpus", "8xA100-80", *TOKENS, "--rates", "none.jsonl"], "none.jsonl"),
        (["--gpus", "3xA100-80", *TOKENS, "--tensor-model-parallel-size", "2"], "a multiple of 2 GPUs"),
        (["--gpus", "8xA100-80"], "rows.jsonl"),
    ],
)
def test_bad_usage_is_refused(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    code, error = planned(recipe, monkeypatch, capsys, *options)
    assert code == 2 and said in error


def test_a_file_without_rates_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "checks.jsonl").write_text('{"check": "machine", "what": "python", "value": "3.11"}\n')
    options = ["--gpus", "8xA100-80", *TOKENS, "--rates", str(tmp_path / "checks.jsonl")]
    code, error = planned(recipe, monkeypatch, capsys, *options)
    assert code == 2 and "no row has a rate" in error


def test_gpus_are_those_of_a_plan(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = planned(recipe, monkeypatch, capsys, "--gpus", "8xA100-80", command=("run",))
    assert code == 2 and "--gpus needs --plan" in error
