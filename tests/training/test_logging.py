"""What a run tells, on the terminal, in metrics.jsonl and to Weights & Biases; a continued run repeats no
row.
"""

import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_lines import logged
from synthetic import make_tiny_recipe, make_tiny_target
from test_guards import make_tiny_trainer
from test_layouts import layout

from megatron_fuse.errors import UserError
from megatron_fuse.report.loss_curve import write_loss_curve
from megatron_fuse.training.directories import metrics_directory
from megatron_fuse.training.metrics import METRICS, STEP, MetricsFile, read_metrics


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_killed_and_continued_file_is_that_of_one_run(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    total = data.draw(st.integers(1, 12))

    def run(path: Path, begin: int, end: int) -> None:
        file = MetricsFile(path, continue_at=begin)
        assert file.skipped == sum(step % 4 == 0 for step in range(1, begin + 1))
        if begin == 0:
            file.write("held-out", 0, {"ce/training": 2.0})
        for step in range(begin + 1, end + 1):
            file.write(
                STEP, step, {"phase": "a", "loss": 1 / step, "grad norm": math.inf if step % 4 == 0 else 1.0}
            )
            if step % 3 == 0:
                file.write("held-out", step, {"ce/training": 1.0})
        file.close()

    directory = tmp_path_factory.mktemp("metrics")
    run(directory / "whole.jsonl", 0, total)
    begin = 0
    for _ in range(data.draw(st.integers(0, 3))):
        killed_at = data.draw(st.integers(begin, total))
        run(directory / "killed.jsonl", begin, killed_at)
        with (directory / "killed.jsonl").open("rb+") as file:  # a machine that lost its power
            file.truncate(
                file.seek(0, 2) - data.draw(st.integers(0, 5)) if killed_at > begin else file.seek(0, 2)
            )
        whole = {
            row["iteration"]
            for row in map(json.loads, (directory / "killed.jsonl").read_bytes().splitlines()[:-1])
        }
        begin = data.draw(st.sampled_from(sorted({0, begin} | {step for step in whole if step < killed_at})))
    run(directory / "killed.jsonl", begin, total)
    assert (directory / "killed.jsonl").read_bytes() == (directory / "whole.jsonl").read_bytes()


def test_rows_are_json_without_exceptions(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / METRICS, continue_at=0)
    file.write(STEP, 1, {"loss": math.nan, "grad norm": math.inf, "phase": "zwölf"})
    file.close()
    assert read_metrics(tmp_path / METRICS) == [
        {"kind": STEP, "iteration": 1, "loss": None, "grad norm": None, "phase": "zwölf"}
    ]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / METRICS, continue_at=0)
    file.close()
    file._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(UserError, match=rf"{METRICS}: cannot be written \(No space left"):
        file.write(STEP, 1, {})
    file.close()


def logged_run(
    workdir: Path, target: Path, sections: dict[str, Any], stub: bool = False
) -> tuple[str, list[dict]] | None:
    """What the reporting rank printed, and the calls that a stub of wandb got."""

    from megatron_fuse.training.trainer import train

    calls: list[dict] = []
    if stub:
        run = SimpleNamespace(log=lambda values, step: calls.append({"log": values, "step": step}))
        run.finish = lambda: calls.append({"finish": True})
        sys.modules["wandb"] = SimpleNamespace(init=lambda **options: calls.append({"init": options}) or run)  # type: ignore[assignment]
    try:
        with logged() as printed:
            trainer = make_tiny_trainer(workdir, target, sections)
            train(trainer)
    finally:
        sys.modules.pop("wandb", None)
    return (printed.getvalue(), calls) if trainer.runtime.is_logging_rank else None


LINE = re.compile(
    r" \[[-\d: ]+\] iteration +(\d+)/ +21 \| consumed samples: +(\d+) \| phase: (\S+) \| elapsed time per "
    r"iteration \(ms\): [\d.]+ "
    r"\| learning rate: \d\.\d{6}E-\d\d \| loss: \d\.\d{6}E[-+]\d\d \| ce/inference: [\d.]+ \| "
    r"kl/inference: [\d.]+ "
    r"(\| ce/training: [\d.]+ \| kl/training: [\d.]+ )?\| grad norm: [\d.]+ \| padding: [\d.]+ \| tokens/s: "
    r"\d+ "
    r"\| tokens/s/GPU: \d+ \| TFLOP/s/GPU: [\d.e-]+ \| memory: [\d.]+ GiB "
    r"\| number of skipped iterations: 0 \| ETA: ([\d:]+) phase, ([\d:]+) run"
)


def test_a_run_and_its_continuation_at_another_layout_write_one_record(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    begun = {"wandb_project": "fusion", "wandb_exp_name": "small", "train_iters": 9, "log_interval": 3}
    recipe = make_tiny_recipe(tmp_path, target)
    results = ranks(2, logged_run, tmp_path, target, {"parallel": layout(pp=2), "training": begun}, True)
    assert results[0] is None  # the last stage reports
    printed, calls = results[1]
    # As if the run had gone on and been killed before its next checkpoint.
    with (metrics_directory(recipe) / METRICS).open("a") as file:
        file.write('{"kind": "step", "iteration": 10, "phase": "co-fusion", "loss": 7.0}\n{"kind": "st')
    rest = {**begun, "train_iters": None, "log_interval": 1}
    ((more, calls_after),) = ranks(1, logged_run, tmp_path, target, {"training": rest}, True)

    lines = [match.groups() for match in map(LINE.fullmatch, (printed + more).splitlines()) if match]
    assert [int(line[0]) for line in lines] == [3, 6, 9, *range(10, 22)]
    assert [line[2] for line in lines] == ["inference"] * 2 + ["co-fusion"] * 13
    assert all((line[3] is not None) == (line[2] == "co-fusion") for line in lines)
    assert lines[-1][4:] == ("0:00:00", "0:00:00")

    rows = read_metrics(metrics_directory(recipe) / METRICS)
    steps = [row for row in rows if row["kind"] == STEP]
    assert [row["iteration"] for row in steps] == list(range(1, 22))
    assert [row["iteration"] for row in rows if row["kind"] == "held-out"] == [0, 7, 9, 21]
    assert all(row["loss"] != 7.0 and row["skipped iterations"] == 0 for row in steps)
    assert ["tokens per second" in row for row in steps[:9]] == [False, False, True] * 3

    first, second = (of_run[0]["init"] for of_run in (calls, calls_after))
    assert (first["project"], first["name"], first["id"]) == ("fusion", "small", second["id"])
    assert second["resume"] == "allow" and calls_after[-1] == {"finish": True}
    sent = [call for call in calls + calls_after if "log" in call and "loss" in call["log"]]
    assert [call["step"] for call in sent] == list(range(1, 22))
    assert all(call["log"]["loss"] == row["loss"] for call, row in zip(sent, steps, strict=True))

    write_loss_curve(metrics_directory(recipe))
    assert (metrics_directory(recipe) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_weights_and_biases_has_to_be_installed(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_fuse.training import trackers

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        trackers.check_wandb()


def test_a_run_with_a_save_directory_of_its_own_has_its_own_record(tmp_path: Path, target: Path) -> None:
    recipe = make_tiny_recipe(tmp_path / "run", target, training={"save": str(tmp_path / "csft")})
    assert metrics_directory(recipe) == tmp_path / "csft"


@pytest.mark.parametrize("packing", [False, True])
def test_throughput_is_the_steps_own_flops_over_their_time_and_ranks(
    ranks, target, tmp_path, packing
) -> None:  # type: ignore[no-untyped-def]
    training = {"log_interval": 3, "train_iters": 9, "packing": packing, "micro_batch_size": 1}
    _, (rows, flops, tokens) = ranks(
        2, speeds_of_a_run, tmp_path, target, {"parallel": layout(pp=2), "training": training}
    )
    printed = [row for row in rows if "TFLOP/s per GPU" in row]
    # After the evaluation and the save at the end of the first phase, iteration 7, the clock starts anew.
    windows = {3: (1, 2, 3), 6: (4, 5, 6), 9: (8, 9)}
    assert [row["iteration"] for row in printed] == list(windows)
    for row in printed:
        window = windows[row["iteration"]]
        seconds = row["milliseconds per iteration"] / 1000 * len(window)
        of_window = sum(flops[iteration] for iteration in window)
        assert row["TFLOP/s per GPU"] == pytest.approx(of_window / seconds / 2 / 1e12, rel=1e-9)
        assert row["MFU"] == pytest.approx(row["TFLOP/s per GPU"] * 1e12 / PEAK, rel=1e-9)
        assert row["tokens per second"] == pytest.approx(
            sum(tokens[iteration] for iteration in window) / seconds, rel=1e-9
        )
        assert row["tokens per second per GPU"] == pytest.approx(row["tokens per second"] / 2, rel=1e-9)


PEAK = 1e9  # FLOP/s, as if of one GPU


def speeds_of_a_run(
    workdir: Path, target: Path, sections: dict[str, Any]
) -> tuple[list[dict], dict, dict] | None:
    """The steps' rows, and the model FLOPs and input tokens of each step, counted token by token."""
    from megatron_fuse.training.trainer import train

    trainer = make_tiny_trainer(workdir, target, sections)
    trainer.log.peak_flops = PEAK
    train(trainer)
    a, dataset = trainer.architecture, trainer.dataset
    kv = a.num_query_groups * a.head_dim
    per_layer = a.hidden_size * (2 * a.num_attention_heads * a.head_dim + 2 * kv + 3 * a.ffn_hidden_size)
    weights = a.num_layers * per_layer + a.hidden_size * a.vocab_size
    flops, tokens, consumed = {}, {}, 0
    while (step := trainer.schedule.step(consumed)) and step.iteration < sections["training"]["train_iters"]:
        consumed, iteration = step.consumed_samples, step.iteration + 1
        flops[iteration] = tokens[iteration] = 0
        for example in dataset.train[step.examples]:
            for mode in ("inference", "training"):
                document = dataset.documents[mode, example]
                if document is None or not getattr(step.phase, mode).is_used:
                    continue
                for position in range(len(document.tokens) - 1):
                    seen = position + 1
                    products = weights + 2 * seen * a.num_layers * a.num_attention_heads * a.head_dim
                    # Forward and twice as much backward, a multiplication and an addition.
                    flops[iteration] += 3 * 2 * products
                    tokens[iteration] += 1
    rows = [row for row in read_metrics(metrics_directory(trainer.recipe) / METRICS) if row["kind"] == STEP]
    return (rows, flops, tokens) if trainer.runtime.is_logging_rank else None
