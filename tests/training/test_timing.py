"""--timing-log-level: which timers there are at a level, what they add up, and that level 0 has none."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from log_lines import logged
from synthetic import make_tiny_target
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_guards import make_tiny_trainer
from test_layouts import layout

from megatron_fuse.training.directories import metrics_directory
from megatron_fuse.training.metrics import METRICS, read_metrics

ONCE_A_STEP = {"forward-backward", "all-grads-sync", "optimizer"}
ONCE_A_MICRO_BATCH = {"forward-compute", "batch-generator", "backward-compute"}
OF_TWO_STAGES = {"forward-recv", "forward-send", "backward-recv", "backward-send"}
SAVE = "save-checkpoint"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


def timed_run(
    workdir: Path, target: Path, sections: dict[str, Any]
) -> tuple[str, list[dict], list[int]] | None:
    """What the reporting rank printed, its rows, and the micro-batches of every step.

    A clock ticks once at every look at it.
    """
    from megatron.core import timers

    from megatron_fuse.training import trainer as trainers

    counts: list[int] = []
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch, logged() as printed:
        patch.setattr(timers, "time", SimpleNamespace(time=lambda: float(next(ticks))))
        trainer = make_tiny_trainer(workdir, target, sections)
        train_step = trainers.train_step

        def counted(trainer: Any, batch: Any, lr: float) -> dict[str, float]:
            counts.append(batch.micro_batches)
            return train_step(trainer, batch, lr)

        patch.setattr(trainers, "train_step", counted)
        trainers.train(trainer)
    rows = read_metrics(metrics_directory(trainer.recipe) / METRICS)
    return (printed.getvalue(), rows, counts) if trainer.runtime.is_logging_rank else None


def seconds_of(row: dict[str, Any]) -> dict[str, float]:
    return {name.partition("/")[2]: value for name, value in row.items() if name.startswith("seconds/")}


@pytest.mark.parametrize(
    ("world_size", "parallel", "level", "timers"),
    [
        pytest.param(1, layout(), 0, set(), id="level-0"),
        pytest.param(1, layout(), 1, ONCE_A_STEP, id="level-1", marks=pytest.mark.slow),
        pytest.param(1, layout(), 2, ONCE_A_STEP | ONCE_A_MICRO_BATCH, id="level-2"),
        pytest.param(2, layout(tp=2), 1, ONCE_A_STEP, id="tp2-level-1"),
        pytest.param(2, layout(pp=2), 1, ONCE_A_STEP, id="pp2-level-1", marks=pytest.mark.slow),
        pytest.param(2, layout(pp=2), 2, ONCE_A_STEP | ONCE_A_MICRO_BATCH | OF_TWO_STAGES, id="pp2-level-2"),
        pytest.param(
            2, layout(overlap_grad_reduce=True), 2, ONCE_A_STEP | ONCE_A_MICRO_BATCH, id="dp2-level-2"
        ),
    ],
)
def test_a_level_has_its_timers_in_log_metrics_and_tensorboard(  # type: ignore[no-untyped-def]
    ranks, target, tmp_path, world_size, parallel, level, timers
) -> None:
    training = {"timing_log_level": level, "train_iters": 2, "save_interval": 1}
    results = ranks(world_size, timed_run, tmp_path, target, {"parallel": parallel, "training": training})
    ((printed, rows, _),) = [result for result in results if result]
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("step", "save", "held-out")}
    assert len(of_kind["step"]) == 2 and len(of_kind["held-out"]) == 2
    for row in of_kind["step"]:
        named = seconds_of(row).keys()
        assert named >= timers and all("send" in name or "recv" in name for name in named - timers)
    assert [seconds_of(row).keys() for row in of_kind["save"]] == ([{SAVE}] * 2 if level else [])
    assert not any(seconds_of(row) for row in of_kind["held-out"])

    shown = re.findall(r"^ time per iteration on the slowest rank \(ms\) \| (.*)$", printed, re.MULTILINE)
    assert len(shown) == (2 if level else 0)
    for line, row in zip(shown, of_kind["step"], strict=False):
        assert line == " | ".join(f"{name}: {1000 * value:.1f}" for name, value in seconds_of(row).items())
    assert len(re.findall(rf"^ saved at iteration \d, .* \| {SAVE}: [\d.]+$", printed, re.MULTILINE)) == (
        2 if level else 0
    )

    board = EventAccumulator(str(tmp_path / "training/tensorboard")).Reload()
    tags = {tag.removeprefix("seconds/") for tag in board.Tags()["scalars"] if tag.startswith("seconds/")}
    assert tags == ({SAVE} | seconds_of(of_kind["step"][0]).keys() if level else set())


def test_timers_hold_a_steps_own_time_alone(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """By the ticks of the clock, to which evaluations and saves in between add nothing."""
    training = {
        "timing_log_level": 2,
        "train_iters": 8,
        "log_interval": 3,
        "eval_interval": 3,
        "save_interval": 3,
    }
    ((_, rows, micro_batches),) = ranks(1, timed_run, tmp_path, target, {"training": training})
    found = {row["iteration"]: seconds_of(row) for row in rows if row["kind"] == "step" and seconds_of(row)}
    assert sorted(found) == [3, 6]
    for iteration, seconds in found.items():
        mean = sum(micro_batches[iteration - 3 : iteration]) / 3
        assert seconds["batch-generator"] == pytest.approx(mean + 1)  # and the plan of the step
        assert seconds["forward-compute"] == pytest.approx(3 * mean)  # with the looks of the timer within it
        assert seconds["backward-compute"] == pytest.approx(mean)
        assert seconds["optimizer"] == seconds["all-grads-sync"] == 1
        assert seconds["forward-backward"] > 6 * mean + 2
    # 7 ends a phase, 8 the run.
    assert [seconds_of(row) for row in rows if row["kind"] == "save"] == [{SAVE: 1}] * 4


def test_level_0_starts_no_timer(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert ranks(
        2, run_without_timers, tmp_path, target, {"parallel": layout(pp=2), "training": {"train_iters": 2}}
    ) == [
        True,
        True,
    ]


def run_without_timers(workdir: Path, target: Path, sections: dict[str, Any]) -> bool:
    """A run in which a timer of Megatron's, which waits for the GPU, would be an error."""
    from megatron.core.timers import Timer

    from megatron_fuse.training.trainer import train

    def refuse(self: Timer, **_: object) -> None:
        raise AssertionError(f"{self.name} is timed")

    with pytest.MonkeyPatch.context() as patch, logged():
        patch.setattr(Timer, "start", refuse)
        trainer = make_tiny_trainer(workdir, target, sections)
        train(trainer)
    return all(chunk.config.timers is None for chunk in trainer.chunks)
