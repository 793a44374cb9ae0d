"""Teacher's mass, student's mass and agreement, per mode and source, against a model of Hugging Face's in
fp64.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from log_lines import logged
from synthetic import SyntheticDataset, make_tiny_recipe, make_tiny_target
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_guards import make_tiny_trainer
from test_layouts import layout, one_report, run_training
from transformers import AutoModelForCausalLM

from megatron_fuse.training.directories import metrics_directory
from megatron_fuse.training.metrics import METRICS, read_metrics

NAMES = ("teacher mass", "student mass", "agreement")
TEMPERATURE = 1.5
SECTIONS = {
    "schedule": {"preset": "simulfuse"},  # both modes in every step
    "loss": {"student_temperature": TEMPERATURE},
    "training": {"train_iters": 1},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"), layers=4)


def expected_means(
    model: torch.nn.Module, dataset: SyntheticDataset, examples: list[int]
) -> dict[str, float]:
    """Token by token, over the supervised tokens with a teacher."""
    values = defaultdict(list)
    for example in examples:
        for mode in ("inference", "training"):
            document = dataset.documents[mode, example]
            if document is None:
                continue
            with torch.no_grad():
                # Row t is about token t + 1.
                logits = model(torch.from_numpy(document.tokens)[None]).logits[0]
            rows = [int(t) - 1 for t in document.supervised.nonzero()[0]]
            entry = 0
            for row, count in zip(rows, document.counts.tolist(), strict=True):
                ids = document.teacher_ids[entry : entry + count].tolist()
                mass = torch.from_numpy(document.teacher_logprobs[entry : entry + count]).double().exp()
                entry += count
                if not count:
                    continue
                student = (logits[row] / TEMPERATURE).softmax(0)[ids].sum().item()
                agrees = float(logits[row].argmax().item() == ids[int(mass.argmax())])
                source = dataset.sources[dataset.winners(mode)[example]]
                for name, value in zip(NAMES, (mass.sum().item(), student, agrees), strict=True):
                    values[f"{name}/{mode}"].append(value)
                    values[f"{name}/{mode}/{source}"].append(value)
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


@pytest.fixture(scope="module")
def expected(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Of the first step and of the validation examples, before anything is learned."""
    from megatron_fuse.training.schedule import make_schedule

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)
    dataset = SyntheticDataset()
    recipe = make_tiny_recipe(tmp_path_factory.mktemp("recipe"), target, **SECTIONS)
    step = make_schedule(recipe, len(dataset.train)).step(0)
    assert step is not None
    return {
        "steps": expected_means(model, dataset, dataset.train[step.examples].tolist()),
        "validation": expected_means(model, dataset, dataset.validation.tolist()),
    }


def of_teachers(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.startswith(NAMES)}


@pytest.mark.parametrize(
    ("world_size", "parallel", "training", "loss"),
    [
        pytest.param(1, layout(), {}, {}, id="one"),
        pytest.param(1, layout(), {"micro_batch_size": 16}, {}, id="both-modes-in-a-micro-batch"),
        pytest.param(1, layout(), {"micro_batch_size": 1, "packing": True}, {}, id="packed"),
        pytest.param(1, layout(), {}, {"fused_linear": True}, id="fused-linear"),
        pytest.param(
            2, layout(tp=2), {}, {"implementation": "reference"}, id="tp2-reference", marks=pytest.mark.slow
        ),
        pytest.param(2, layout(tp=2), {"micro_batch_size": 1, "packing": True}, {}, id="tp2-packed"),
        pytest.param(2, layout(), {}, {}, id="dp2", marks=pytest.mark.slow),  # as packed
        pytest.param(2, layout(), {"micro_batch_size": 1, "packing": True}, {}, id="dp2-packed"),
        pytest.param(2, layout(pp=2), {}, {}, id="pp2", marks=pytest.mark.slow),  # as with virtual stages
        pytest.param(2, layout(pp=2, vp=2), {"micro_batch_size": 3}, {}, id="pp2-vp2"),
        pytest.param(4, layout(tp=2, pp=2), {}, {"fused_linear": True}, id="tp2-pp2-fused-linear"),
    ],
)
def test_a_layout_reports_what_the_logits_say(  # type: ignore[no-untyped-def]
    ranks, expected, target, tmp_path, world_size, parallel, training, loss
) -> None:
    sections = {
        **SECTIONS,
        "parallel": parallel,
        "training": SECTIONS["training"] | training,
        "loss": SECTIONS["loss"] | loss,
    }
    report = one_report(ranks(world_size, run_training, tmp_path, target, sections))
    for kind, means in expected.items():
        found = of_teachers(report[kind][0])
        assert found.keys() == means.keys() and len(found) >= 12
        assert found == pytest.approx(means, rel=1e-5, abs=1e-9), kind
    assert 0 < expected["validation"]["student mass/training"] < 1


def test_a_source_without_tokens_and_a_mode_without_kl_have_no_key(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    phase = {
        "name": "one",
        "epochs": 1,
        "inference": {"weight": 1, "lambda": 0},
        "training": {"weight": 1, "lambda": 1},
    }
    sections = {"schedule": {"preset": None, "phases": [phase]}, "training": {"train_iters": 7}}
    steps = one_report(ranks(1, run_training, tmp_path, target, sections))["steps"]
    named = [{name.split("/")[2] for name in of_teachers(step) if name.count("/") == 2} for step in steps]
    assert {"alpha", "beta"} in named and {"alpha", "beta", "gamma"} in named
    assert not any("inference" in name for step in steps for name in of_teachers(step))
    assert all("ce/inference" in step for step in steps)


def test_the_numbers_are_recorded_and_not_printed(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    ((printed, rows),) = ranks(1, logged_run, tmp_path, target, SECTIONS)
    board = EventAccumulator(str(tmp_path / "training/tensorboard")).Reload()
    tags = set(board.Tags()["scalars"])
    for row in rows:
        found = of_teachers(row)
        assert len(found) >= 12
        prefix = "held-out/" if row["kind"] == "held-out" else ""
        assert {prefix + name.replace(" ", "-") for name in found} <= tags
    assert "ce/training" in printed and not any(name in printed for name in NAMES)


def logged_run(workdir: Path, target: Path, sections: dict[str, Any]) -> tuple[str, list[dict]]:
    from megatron_fuse.training.trainer import train

    with logged() as printed:
        trainer = make_tiny_trainer(workdir, target, sections)
        train(trainer)
    return printed.getvalue(), read_metrics(metrics_directory(trainer.recipe) / METRICS)
