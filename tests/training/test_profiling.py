"""--profile: a readable trace of the chosen iterations on the chosen ranks, and of nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from log_lines import logged
from synthetic import make_tiny_recipe, make_tiny_target
from test_guards import make_tiny_trainer
from test_layouts import layout

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import dump_recipe, load_recipe
from megatron_fuse.training.profiling import check_profile


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target"))


def profiled_run(workdir: Path, target: Path, sections: dict[str, Any]) -> str:
    """What this rank printed."""
    from megatron_fuse.training.trainer import train

    with logged() as printed:
        train(make_tiny_trainer(workdir, target, sections))
    return printed.getvalue()


def traces(workdir: Path) -> dict[str, list[int]]:
    """The iterations that each file's events name, by file."""
    found = {}
    for path in sorted((workdir / "training/profile").glob("*")):
        events = json.loads(path.read_text())["traceEvents"]
        names = [event.get("name", "") for event in events]
        assert {"aten::mm", "aten::embedding"} & set(names), path
        steps = {int(match[1]) for match in map(re.compile(r"ProfilerStep#(\d+)").fullmatch, names) if match}
        found[path.name] = sorted(steps)
    return found


def options(start: int, end: int, ranks: list[int], **training: Any) -> dict[str, Any]:
    profile = {"profile": True, "profile_step_start": start, "profile_step_end": end, "profile_ranks": ranks}
    return {"train_iters": 4, **profile, **training}


@pytest.mark.parametrize(
    ("world_size", "parallel", "training", "files"),
    [
        pytest.param(1, layout(), {"train_iters": 2}, {}, id="without"),
        pytest.param(1, layout(), options(1, 2, [0]), {"rank-0.iterations-1-1": [1]}, id="the-first"),
        pytest.param(1, layout(), options(2, 4, [0]), {"rank-0.iterations-2-3": [2, 3]}, id="two"),
        pytest.param(
            1, layout(), options(3, 9, [0]), {"rank-0.iterations-3-4": [3, 4]}, id="to-the-end-of-the-run"
        ),
        pytest.param(2, layout(tp=2), options(2, 3, [1]), {"rank-1.iterations-2-2": [2]}, id="one-of-two"),
        pytest.param(
            2,
            layout(pp=2),
            options(2, 4, [1, 0, 1]),
            {"rank-0.iterations-2-3": [2, 3], "rank-1.iterations-2-3": [2, 3]},
            id="both-stages",
        ),
    ],
)
def test_the_chosen_iterations_of_the_chosen_ranks_are_traced(  # type: ignore[no-untyped-def]
    ranks, target, tmp_path, world_size, parallel, training, files
) -> None:
    printed = ranks(world_size, profiled_run, tmp_path, target, {"parallel": parallel, "training": training})
    assert traces(tmp_path) == {f"{name}.pt.trace.json": steps for name, steps in files.items()}
    assert "".join(printed).count(f"traces go to {tmp_path / 'training/profile'}") == bool(files)


def test_a_continued_run_traces_the_iterations_that_are_left(ranks, target, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for train_iters, new in (
        (2, {}),
        (3, {"rank-0.iterations-3-3": [3]}),
        (5, {"rank-0.iterations-4-4": [4]}),
        (6, {}),
    ):
        before = traces(tmp_path)
        training = options(3, 5, [0], train_iters=train_iters)
        if train_iters < 3:
            training["profile"] = False  # the run ends before
        ranks(1, profiled_run, tmp_path, target, {"training": training})
        added = {f"{name}.pt.trace.json": steps for name, steps in new.items()}
        assert traces(tmp_path) == before | added


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            options(10, 10, [0]),
            r"training: profile_step_end is 10, but .* Set it above profile_step_start \(10\)",
        ),
        (options(0, 2, [0]), r"training\.profile_step_start: .*greater than or equal to 1"),
        (options(1, 2, []), r"training\.profile_ranks: .*at least 1 item"),
        (options(1, 2, [-1]), r"training\.profile_ranks\.0: .*greater than or equal to 0"),
        ({"timing_log_level": 3}, r"training\.timing_log_level: .*less than or equal to 2"),
    ],
)
def test_values_that_profile_nothing_are_refused(
    target: Path, tmp_path: Path, training: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_tiny_recipe(tmp_path, target, training=training)


@pytest.mark.parametrize(
    ("training", "world_size", "message"),
    [
        (options(1, 2, [0, 2]), 2, r"--profile-ranks: there is no rank 2. Choose from 0 to 1"),
        (options(1, 2, [1]), 1, r"--profile-ranks: there is no rank 1. Choose from 0 to 0"),
        (
            options(5, 7, [0]),
            1,
            r"--profile-step-start 5 is after the last iteration of the run, 4. Choose an earlier iteration",
        ),
    ],
)
def test_ranks_and_iterations_that_do_not_come_are_refused(
    target: Path, tmp_path: Path, training: dict, world_size: int, message: str
) -> None:
    recipe = make_tiny_recipe(tmp_path, target, training=training)
    with pytest.raises(UserError, match=message):
        check_profile(recipe, ranks=world_size, last_step=4)
    unprofiled = recipe.model_copy(update={"training": recipe.training.model_copy(update={"profile": False})})
    check_profile(unprofiled, ranks=world_size, last_step=4)


def test_flags_bear_megatrons_names(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(make_tiny_recipe(tmp_path, target)))
    assert yaml.safe_load(path.read_text())["training"]["profile_ranks"] == [0]
    given = "--profile --profile-step-start 3 --profile-step-end 5 --profile-ranks 0 3 --timing-log-level 2"
    training = load_recipe(argv=["--recipe", str(path), *given.split()]).training
    assert training.profile and (training.profile_step_start, training.profile_step_end) == (3, 5)
    assert (training.profile_ranks, training.timing_log_level) == ([0, 3], 2)
    with pytest.raises(
        UserError, match=r"--profile-ranks: training\.profile_ranks\.1: .*integer.*given: 'one'"
    ):
        load_recipe(argv=["--recipe", str(path), "--profile-ranks", "0", "one"])
