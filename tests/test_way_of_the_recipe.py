"""Each step of a process passes the recipe only to packages that no earlier step has used.

Calls from `stages`, which builds the Context, and from the list of stages are not counted: they read what a
stage declares.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from rank_pool import RankPool

import megatron_fuse
from megatron_fuse.recipe import Recipe
from megatron_fuse.selection.curriculum import CURRICULUM

LIBRARY = Path(megatron_fuse.__file__).parent


def place_of(frame: FrameType | None) -> tuple[str, ...]:
    """The parts of the file's path in the library, of the nearest frame that is of the library."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(LIBRARY):
            return path.relative_to(LIBRARY).with_suffix("").parts
        frame = frame.f_back
    return ("outside",)


def way_of_recipe(function: Callable, *arguments: Any) -> list[tuple[str, str]]:
    """(package of the caller, of the function called) of each call with a recipe as an argument, in order."""
    calls: list[tuple[str, str]] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not any(type(frame.f_locals.get(name)) is Recipe for name in names):
            return
        caller, callee = place_of(frame.f_back), place_of(frame)
        if caller[0] == "stages" or caller == ("pipeline", "stages"):
            return
        if caller[0] != callee[0] and callee[0] not in ("recipe", "stages", "outside"):
            calls.append((caller[0], callee[0]))

    sys.setprofile(watch)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return calls


def packages_of_each_step(calls: list[tuple[str, str]]) -> list[set[str]]:
    """The packages that each step uses.

    A step begins if the first package calls another one than at the step before. Calls that return to a
    package within a step are not seen.
    """
    first, steps, last = calls[0][1], [set[str]()], ""
    for caller, callee in calls[1:]:
        if caller == first and callee != last:
            steps.append(set())
            last = callee
        steps[-1].add(callee)
    return steps


def way_of_a_training(recipe: Recipe) -> list[tuple[str, str]]:
    from megatron_fuse.pretrain import pretrain

    return way_of_recipe(pretrain, recipe)


def way_to_the_training(recipe: Recipe) -> list[tuple[str, str]]:
    """All steps of `megatron-fuse run` before the training, whose commands have done their work."""
    from megatron_fuse.pipeline import run
    from megatron_fuse.pipeline.start import start_recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_tied", lambda *_, **__: 0)
        return way_of_recipe(start_recipe, recipe, 1, CURRICULUM.name)


def test_a_package_is_entered_once(ranks: RankPool, copied: Recipe) -> None:
    training = copied.training.model_copy(
        update={"train_iters": 2, "global_batch_size": 3, "precision": "fp32"}
    )
    recipe = copied.model_copy(update={"training": training})
    (trained,) = ranks(1, way_of_a_training, recipe)
    (prepared,) = ranks(1, way_to_the_training, recipe)
    for calls, wanted in ((trained, ["target", "dataset", "training"]), (prepared, ["target", "capture"])):
        steps = packages_of_each_step(calls)
        used = [package for step in steps for package in sorted(step)]
        assert len(used) == len(set(used)), steps
        assert [package for package in used if package in wanted] == wanted, steps
