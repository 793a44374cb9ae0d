"""The learning rate of every step is what a formula in fp64 says, and Megatron-core's own scheduler; a run
and its continuation have it.
"""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SyntheticDataset, make_tiny_recipe, make_tiny_target
from test_checkpoint import checkpoints, message_of_refusal, run_and_return_output
from test_layouts import one_report, run_training

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.training_options import TrainingOptions
from megatron_fuse.training.learning_rate import make_learning_rate
from megatron_fuse.training.schedule import make_schedule

TOTAL = 60
WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 12}
STYLES: dict[str, dict[str, Any]] = {
    "default": {},
    "constant": {"lr_decay_style": "constant"},
    "linear": {"lr_decay_style": "linear"},
    "cosine": {"lr_decay_style": "cosine"},
    "WSD": WSD,
    **{
        f"WSD-{style}": {**WSD, "lr_wsd_decay_style": style}
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    },
}
# None; one step; many; a share that is whole (0.1 * 60 is 6), one that is not, and one that is not in binary
# (0.3 * 60 is 18)
WARMUPS: list[dict[str, Any]] = [
    {},
    {"lr_warmup_iters": 1},
    {"lr_warmup_iters": 17},
    *({"lr_warmup_fraction": fraction} for fraction in (0.0, 0.1, 0.123, 0.3)),
]
DECAYS = [None, 40, 90]  # the whole schedule, less, and more than the run has


def left_of_the_way(style: str, done: float) -> np.float64:
    """From lr to min_lr."""
    done = np.float64(done)
    match style:
        case "linear":
            return 1 - done
        case "cosine":
            return np.cos(done * np.pi / 2) ** 2
        case "exponential":
            return np.exp2(1 - done) - 1
        case "minus_sqrt":
            return 1 - done**0.5
    raise AssertionError(style)


def expected_rate(options: TrainingOptions, step: int, total: int) -> float:
    """In fp64, of the step after `step` others."""
    lr, min_lr = np.float64(options.lr), np.float64(options.min_lr)
    end = total if options.lr_decay_iters is None else options.lr_decay_iters
    warmup = np.float64(options.lr_warmup_iters)
    if options.lr_warmup_fraction is not None:
        warmup = np.float64(options.lr_warmup_fraction) * end
    if step + 1 <= warmup:
        return float(lr * ((step + 1) / warmup))
    style, start = options.lr_decay_style, warmup
    if style == "constant":
        return float(lr)
    if style == "WSD":
        style, start = options.lr_wsd_decay_style or "", np.float64(end - (options.lr_wsd_decay_iters or 0))
    done = np.clip((step - start) / (end - start), 0, 1)
    return float(min_lr + (lr - min_lr) * left_of_the_way(style, done))


def options_of(style: str, warmup: dict[str, Any], decay: int | None) -> TrainingOptions:
    constant = style == "constant"
    ends = {} if constant else {"min_lr": 2e-5, "lr_decay_iters": decay}
    return TrainingOptions(lr=3e-4, **ends, **STYLES[style], **warmup)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", WARMUPS, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_every_step_has_the_rate_of_the_formula(
    style: str, warmup: dict[str, Any], decay: int | None
) -> None:
    options = options_of(style, warmup, decay)
    rate = make_learning_rate(options, TOTAL)
    found = [rate.at(step) for step in range(TOTAL + 5)]
    assert found == pytest.approx(
        [expected_rate(options, step, TOTAL) for step in range(TOTAL + 5)], rel=1e-12
    )
    assert max(found) <= options.lr * (1 + 1e-15)
    if style == "default":
        assert options.lr_decay_style == "cosine"


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", WARMUPS, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_after_the_warm_up_the_rates_are_megatrons_bit_for_bit(
    style: str, warmup: dict[str, Any], decay: int | None
) -> None:
    from megatron_fuse.runtime import enable_cpu_megatron

    enable_cpu_megatron()
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    options = options_of(style, warmup, decay)
    rate, group = make_learning_rate(options, TOTAL), dict[str, float]()
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=rate.warmup,
        lr_decay_steps=decay or TOTAL,
        lr_decay_style=options.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=TOTAL,
        wd_incr_style="constant",
        wsd_decay_steps=options.lr_wsd_decay_iters,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
    )
    compared = 0
    for step in range(TOTAL):
        if step >= rate.warmup:
            assert rate.at(step) == group["lr"], step
            compared += 1
        else:  # its warm-up is one step behind
            assert rate.at(step) == pytest.approx(min(group["lr"] + options.lr / rate.warmup, options.lr))
        scheduler.step(1)
    assert compared >= TOTAL - 27


@given(
    lr=st.floats(1e-12, 10),
    share=st.floats(0, 1),
    total=st.integers(1, 3000),
    warmup=st.integers(0, 4000),  # more than the run has too: it then ends on the way up
    data=st.data(),
)
def test_without_the_options_the_rate_is_warm_up_and_cosine_bit_for_bit(
    lr: float, share: float, total: int, warmup: int, data: st.DataObject
) -> None:
    min_lr, iteration = lr * share if lr * share >= 1e-12 else 0.0, data.draw(st.integers(0, total - 1))
    if iteration < warmup:
        expected = lr * (iteration + 1) / warmup
    else:
        progress = min((iteration - warmup) / max(total - warmup, 1), 1.0)
        expected = min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    options = TrainingOptions(lr=lr, min_lr=min_lr, lr_warmup_iters=warmup)
    assert make_learning_rate(options, total).at(iteration) == expected


@pytest.mark.parametrize("warmup", [{"lr_warmup_iters": 49}, {"lr_warmup_fraction": 0.81}], ids=str)
def test_wsd_that_does_not_fit_into_the_schedule_is_refused(warmup: dict[str, Any]) -> None:
    options = TrainingOptions(**WSD, **warmup)
    (key,) = warmup
    with pytest.raises(
        UserError, match=rf"60 steps, .*lr_wsd_decay_iters \(12\) .*{key} .*raise lr_decay_iters"
    ):
        make_learning_rate(options, TOTAL)
    assert make_learning_rate(options, 100).decay_from == 88


def test_a_dry_run_says_when_the_rate_changes() -> None:
    said = {
        style: str(make_learning_rate(options_of(style, {"lr_warmup_fraction": 0.1}, None), TOTAL))
        for style in STYLES
    }
    assert said["constant"] == "0.0003 after a warm-up of 6 steps, then constant"
    assert said["default"] == "0.0003 after a warm-up of 6 steps, cosine to 2e-05 from step 6 to step 60"
    assert said["WSD"] == "0.0003 after a warm-up of 6 steps, exponential to 2e-05 from step 48 to step 60"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


TRAINING = {"global_batch_size": 20, "micro_batch_size": 10, "train_iters": 8}  # of 9 steps in all
OF_RUN: dict[str, dict[str, Any]] = {
    "constant": {"lr_decay_style": "constant", "lr_warmup_iters": 4},
    "linear": {"lr_decay_style": "linear", "lr_warmup_fraction": 0.2, "min_lr": 1e-5},
    "cosine": {"lr_decay_iters": 6, "lr_warmup_iters": 2, "min_lr": 1e-5},
    "WSD": {
        "lr_decay_style": "WSD",
        "lr_wsd_decay_iters": 6,
        "lr_wsd_decay_style": "minus_sqrt",
        "lr_warmup_iters": 1,
    },
}


# Stopped in the warm-up, between, or in the decay, by the style
@pytest.mark.parametrize("style", OF_RUN)
def test_a_run_and_its_continuation_have_the_rates_of_the_whole(ranks, target, tmp_path, style) -> None:  # type: ignore[no-untyped-def]
    training = {**TRAINING, **OF_RUN[style]}
    recipe = make_tiny_recipe(tmp_path, target, training=training)
    total = make_schedule(recipe, len(SyntheticDataset().train)).total_steps
    found = []
    for last in (3, 8):  # the run is cut short twice, and its rates stay those of the whole schedule
        sections = {"training": {**training, "train_iters": last}}
        found += one_report(ranks(1, run_training, tmp_path, target, sections))["steps"]
    assert [step["iteration"] for step in found] == list(range(1, 9)) and total == 9
    expected = [expected_rate(recipe.training, step, total) for step in range(8)]
    assert [step["lr"] for step in found] == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) > 3


@pytest.fixture(scope="module")
def begun(ranks, target, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """A run with WSD, stopped after two steps."""
    directory = tmp_path_factory.mktemp("begun")
    ranks(1, run_training, directory, target, {"training": {**TRAINING, **WSD_OF_RUN, "train_iters": 2}})
    return directory


WSD_OF_RUN = {
    "seed": 5,
    "lr_decay_style": "WSD",
    "lr_wsd_decay_iters": 4,
    "lr_warmup_fraction": 0.1,
    "lr_decay_iters": 9,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 6}, r"has seed = 5, but this run has seed = 6"),
        ({"seed": None}, r"has seed = 5, but this run has seed = 1234"),
        (
            {"lr_decay_style": "linear", "lr_wsd_decay_iters": None},
            r"'lr_decay_style': 'WSD', .*this run has step = \{'lr_decay_style': 'linear', ",
        ),
        (
            {"lr_decay_iters": 8},
            r"has step = {'lr_decay_iters': 9}, but this run has step = {'lr_decay_iters': 8}",
        ),
        (
            {"lr_decay_iters": None},
            r"has step = {'lr_decay_iters': 9}, but this run has step = {'lr_decay_iters': None}",
        ),
        (
            {"lr_warmup_fraction": 0.2},
            r"{'lr_warmup_fraction': 0.1}, but this run has step = {'lr_warmup_fraction': 0.2}",
        ),
        (
            {"lr_wsd_decay_iters": 5},
            r"{'lr_wsd_decay_iters': 4}, but this run has step = {'lr_wsd_decay_iters': 5}",
        ),
        (
            {"lr_wsd_decay_style": "cosine"},
            r"'exponential'}, but this run has step = {'lr_wsd_decay_style': 'cosine'}",
        ),
    ],
    ids=str,
)
def test_a_changed_rate_or_seed_is_refused_as_another_run(ranks, begun, target, changed, message) -> None:  # type: ignore[no-untyped-def]
    sections = {"training": {**TRAINING, **WSD_OF_RUN, **changed}}
    (refusal,) = ranks(1, message_of_refusal, begun, target, sections)
    assert re.search(message, refusal) and "Restore the old value" in refusal and "--override" in refusal


def test_a_changed_rate_is_taken_with_a_warning_where_that_is_asked_for(
    ranks, begun, target, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    training = {**TRAINING, **WSD_OF_RUN, "lr_wsd_decay_iters": 5, "train_iters": 3, "override": True}
    training |= {"load": str(checkpoints(begun)), "save": str(tmp_path)}
    (output,) = ranks(1, run_and_return_output, begun, target, {"training": training})
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "this run has step = {'lr_wsd_decay_iters': 5}" in warnings[0]


# A checkpoint of a version that knew one decay only names none
@pytest.mark.parametrize(("style", "accepted"), [("cosine", True), ("linear", False)])
def test_a_checkpoint_without_these_options_had_the_defaults(
    ranks, target, tmp_path, style, accepted
) -> None:  # type: ignore[no-untyped-def]
    ranks(1, run_training, tmp_path, target, {"training": {**TRAINING, "train_iters": 2}})
    metadata = checkpoints(tmp_path) / "iter_0000002/facts.json"
    content = json.loads(metadata.read_text())
    new = [key for key in content["run"]["step"] if key.startswith("lr_") and key != "lr_warmup_iters"]
    assert len(new) == 5
    for key in new:
        del content["run"]["step"][key]
    metadata.write_text(json.dumps(content))
    (metadata.parent / "checksums.json").unlink()
    training = {**TRAINING, "train_iters": 3, "verify": False, "lr_decay_style": style}
    (message,) = ranks(1, message_of_refusal, tmp_path, target, {"training": training})
    assert (message == "accepted") == accepted and (accepted or "'lr_decay_style': 'cosine'}" in message)


def test_the_seed_of_a_training_decides_its_order_and_nothing_else() -> None:
    def steps(**seeds: Any) -> list[list[int]]:
        recipe = make_tiny_recipe(Path("w"), Path("t"), training={"seed": seeds.get("of_training")})
        schedule = make_schedule(recipe.model_copy(update={"seed": seeds["seed"]}), 53)
        found, consumed = [], 0
        while step := schedule.step(consumed):
            found.append(step.examples.tolist())
            consumed = step.consumed_samples
        return found

    assert steps(seed=1) == steps(seed=1, of_training=1) == steps(seed=2, of_training=1)
    assert steps(seed=1) != steps(seed=2) == steps(seed=1, of_training=2)
