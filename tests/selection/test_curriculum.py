"""Laws of the curriculum: what is measured, in which order examples come, and which run may go on with it."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import TEXT
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.pipeline import steps
from megatron_fuse.recipe import Margin, Recipe, dump_recipe
from megatron_fuse.responses import RESPONSES, generate_responses, response_shards
from megatron_fuse.scoring.scores import load_scores, score_responses
from megatron_fuse.selection.array_file import read_arrays, write_arrays
from megatron_fuse.selection.curriculum import Curriculum, curriculum, curriculum_path, read_curriculum
from megatron_fuse.stages import Context
from megatron_fuse.verification import verify_fusion_data


def ordered(recipe: Recipe, order: str, **schedule: Any) -> Recipe:
    return recipe.model_copy(
        update={"schedule": recipe.schedule.model_copy(update={"order": order, **schedule})}
    )


def order_of(recipe: Recipe) -> Curriculum | None:
    """As training reads it."""
    return read_curriculum(recipe, Context(recipe).open_alone(TEXT).sha256)


def built(recipe: Recipe, order: str) -> Recipe:
    recipe = ordered(recipe, order)
    build_fusion_data(Context(recipe))
    return recipe


# few different values, so that many are equal; NaN is one of them
values_of_examples = st.lists(
    st.sampled_from([-1.5, -0.0, 0.0, 2.0, 3e38, float("nan")]), min_size=1, max_size=30
)


@given(
    values=values_of_examples.map(lambda values: np.array(values, np.float32)), highest_first=st.booleans()
)
def test_ranks_sort_the_values_and_leave_nan_to_the_end(values: np.ndarray, highest_first: bool) -> None:
    ranks = curriculum(values, highest_first=highest_first).ranks
    for i, j in np.ndindex(len(values), len(values)):
        a, b = (-values[[i, j]] if highest_first else values[[i, j]]).tolist()
        before = a < b or (np.isnan(b) and not np.isnan(a))
        assert (ranks[i] < ranks[j]) == before, (values, i, j)


@given(values=values_of_examples.map(lambda values: np.array(values, np.float32)))
def test_what_counts_of_a_curriculum_is_the_order_alone(values: np.ndarray) -> None:
    up, down = (curriculum(values, highest_first=highest_first) for highest_first in (False, True))
    assert curriculum(values / 2 + 7, highest_first=False).sha256 == up.sha256
    assert (up.sha256 == down.sha256) == (up.ranks == down.ranks).all()


def test_the_length_is_that_of_the_ground_truth_in_the_targets_tokens(copied: Recipe) -> None:
    recipe = built(copied, "gt_length")
    dataset = FusionDataset(recipe)
    found = load_file(curriculum_path(recipe))["gt_tokens"]
    labels = [int(dataset.document("training", n).supervised.sum()) for n in range(len(dataset.example_ids))]
    assert found.tolist() == labels and len(set(labels)) > 3
    ranks = order_of(recipe).ranks
    assert (np.diff(found[np.argsort(ranks)]) >= 0).all()


def test_the_reward_is_the_strongest_reward_models_of_the_source_that_is_the_target(copied: Recipe) -> None:
    for strongest in ("one", "two"):
        selection = copied.selection.model_copy(update={"strongest": strongest})
        recipe = built(copied.model_copy(update={"selection": selection}), "target_reward")
        assert recipe.target_as_source == "alpha"
        found = load_file(curriculum_path(recipe))["target_reward"]
        assert np.array_equal(found, load_scores(Context(recipe), "alpha", strongest), equal_nan=True)
        assert (np.diff(found[np.argsort(order_of(recipe).ranks)]) <= 0).all()


def test_shuffled_examples_need_no_curriculum(copied: Recipe) -> None:
    recipe = built(copied, "shuffled")
    curriculum_path(recipe).unlink()
    assert order_of(recipe) is None
    assert verify_fusion_data(Context(recipe)).problems == []


def test_missing_scores_are_named_with_the_command_that_makes_them(copied: Recipe) -> None:
    shutil.rmtree(copied.workdir / "scores" / "alpha")
    with pytest.raises(UserError, match=r"scores/alpha/one does not exist\. Run megatron-fuse score"):
        built(copied, "target_reward")


def rewrite(recipe: Recipe, edit: Callable[[dict, dict], object]) -> None:
    """Changes arrays and header of the file in place."""
    path = curriculum_path(recipe)
    arrays, header = read_arrays(path, "")
    edit(arrays, header)
    write_arrays(path, arrays, header)


def overwrite(recipe: Recipe) -> None:
    """Changes an array behind the checksum's back."""
    path = curriculum_path(recipe)
    with safe_open(path, "np") as file:
        header = file.metadata()
    arrays = load_file(path)
    arrays["target_reward"].put(3, 9.5)
    save_file(arrays, path, header)


REFUSALS: dict[str, tuple[Callable[[Recipe], object], str]] = {
    "missing": (lambda recipe: curriculum_path(recipe).unlink(), "does not exist"),
    "no safetensors": (lambda recipe: curriculum_path(recipe).write_bytes(b"x"), "damaged"),
    "no header": (
        lambda recipe: save_file({"a": np.zeros(1)}, curriculum_path(recipe)),
        "the header has no 'made'",
    ),
    "other values": (overwrite, r"damaged \(arrays and basis have sha256"),
    "other text": (
        lambda recipe: rewrite(recipe, lambda arrays, header: header["target_reward"].update(text="0" * 64)),
        "target_reward was made with text = '0000",
    ),
    "without the measure": (
        lambda recipe: rewrite(
            recipe, lambda arrays, header: (arrays.pop("target_reward"), header.pop("target_reward"))
        ),
        "has no target_reward",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_curriculum_that_is_not_the_recipes_is_refused(copied: Recipe, case: str) -> None:
    recipe = built(copied, "target_reward")
    damage, said = REFUSALS[case]
    damage(recipe)
    with pytest.raises(
        UserError, match=rf"curriculum-target_reward\.safetensors.* ?{said}.*\. Run megatron-fuse build"
    ):
        order_of(recipe)
    built(copied, "target_reward")
    order_of(recipe)


def test_another_reward_model_or_another_target_is_another_curriculum(copied: Recipe) -> None:
    recipe = built(copied, "target_reward")
    other = recipe.model_copy(update={"selection": recipe.selection.model_copy(update={"strongest": "two"})})
    with pytest.raises(UserError, match="reward model = 'one', but now it is 'two'"):
        order_of(other)
    own = recipe.target.model_copy(update={"stop": ["User:"]})  # which the source alpha does not have
    with pytest.raises(UserError, match="answers = 'alpha', but now it is 'target'"):
        order_of(recipe.model_copy(update={"target": own}))


@pytest.mark.parametrize("name", ["gt_tokens", "target_reward"])
def test_verification_measures_again(copied: Recipe, name: str) -> None:
    recipe = built(copied, "target_reward")
    assert verify_fusion_data(Context(recipe)).problems == []

    def edit(arrays: dict, header: dict) -> None:
        arrays[name][4] = 7

    rewrite(recipe, edit)
    (problem,) = verify_fusion_data(Context(recipe)).problems
    assert (
        f"{curriculum_path(recipe).name}: example 'e4': {name} is 7" in problem
        and "(1 examples differ)" in problem
    )


def test_a_machine_that_only_trains_verifies_what_it_has(copied: Recipe) -> None:
    recipe = built(copied, "target_reward")
    for name in ("instructions", "responses", "scores", "captures"):
        shutil.rmtree(copied.workdir / name)
    assert order_of(recipe) is not None
    assert verify_fusion_data(Context(recipe)).problems == []


def test_a_target_that_is_no_source_answers_and_is_scored_first(tmp_path: Path) -> None:
    """CSFT in the order of the target's own reward: nobody else answers, nobody else is scored, nothing is
    captured.
    """
    rows = [
        {"id": f"e{i}", "instruction": f"Add {i} and {i + 1}.", "output": f"That makes {2 * i + 1}."}
        for i in range(14)
    ]
    recipe = small_recipe(
        tmp_path / "work",
        write_rows(tmp_path / "data.jsonl", rows),
        save_model(tmp_path / "target", "llama", seed=1),
        {"beta": save_model(tmp_path / "beta", "gpt_neox", seed=2)},
        data={"shard_size": 4, "validation_samples": 3},
        reward_models={
            name: {
                "model": str(save_model(tmp_path / name, "llama", seed=seed, reward=True)),
                "dtype": "fp32",
            }
            for name, seed in (("weak", 4), ("strong", 3))
        },
        selection={"strongest": "strong"},
        schedule={"preset": "csft", "order": "target_reward"},
        responses={"max_new_tokens": 6},
    )
    works = [work for works in steps(recipe).values() for work in works]
    order = curriculum_path(recipe).relative_to(recipe.workdir)
    data = ["instructions", "responses/target", "scores/target/strong", f"{order.parent}/text", str(order)]
    assert [work.label(recipe) for work in works] == [*data, "training", "export"]
    prepare_instructions(Context(recipe))
    generate_responses(Context(recipe), "target")
    score_responses(Context(recipe), "strong", ["target"])
    build_fusion_data(Context(recipe))
    context = Context(recipe)
    assert [work.state(context) for work in works] == ["done"] * len(data) + ["to do"] * 2
    assert verify_fusion_data(Context(recipe)).problems == []

    rewards = load_file(curriculum_path(recipe))["target_reward"]
    assert np.array_equal(rewards, load_scores(Context(recipe), "target", "strong"), equal_nan=True)
    answers = [
        answer for shard in response_shards(Context(recipe).open(RESPONSES, "target")) for answer in shard
    ]
    assert np.isnan(rewards).tolist() == [not answer.response.strip() for answer in answers]
    scored = rewards[~np.isnan(rewards)]
    assert len(scored) > 3 and len(set(scored.tolist())) > 3  # so that there is something to order
    order = np.argsort(order_of(recipe).ranks, kind="stable")
    assert rewards[order][: len(scored)].tolist() == sorted(scored.tolist(), reverse=True)


def test_the_command_says_what_was_chosen_and_measured(
    copied: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With a margin that nobody reaches: every example that several sources can win counts less."""
    margin = Margin(at_least=1e9, weight=0.25)
    selection = copied.selection.model_copy(update={"training_margin": margin})
    recipe = ordered(copied.model_copy(update={"selection": selection}), "target_reward")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    tool = Path(__file__).resolve().parents[2] / "tools" / "build_fusion_data.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "--recipe", str(tmp_path / "r.yaml")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    dataset = FusionDataset(recipe)
    examples = len(dataset.example_ids)
    for mode, chosen in dataset.selections.items():
        for place, name in {**dict(enumerate(recipe.sources)), -1: "none"}.items():
            won = int((chosen.source == place).sum())
            assert re.search(rf"^{mode} mode, .*\b{name}: {won} \({won / examples:.1%}\)", said, re.MULTILINE)
    below = int((dataset.selections["training"].weight < 1).sum())
    assert (
        below > 0 and f"; {below} ({below / examples:.1%}) are won by less than 1e+09 and count 0.25" in said
    )
    measures = load_file(curriculum_path(recipe))
    least, most = measures["gt_tokens"].min(), measures["gt_tokens"].max()
    assert f"order of the examples: target_reward; ground truth of {least} to {most} target tokens" in said
    assert f"reward of alpha's answers by one: {np.nanmin(measures['target_reward']):.3g} to" in said
    assert f"{np.isnan(measures['target_reward']).sum()} not scored" in said


def train_in_order(recipe: Recipe, iterations: int) -> list[list[int]]:
    """One rank of a run that goes on to so many steps; the examples of every step of the whole schedule."""
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.target import read_target
    from megatron_fuse.training.target import build_target
    from megatron_fuse.training.trainer import make_trainer, train

    options = {"train_iters": iterations, "global_batch_size": 3, "precision": "fp32"}
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=options)})
    runtime = start_runtime()
    target = read_target(recipe)
    dataset = FusionDataset(recipe)
    trainer = make_trainer(recipe, runtime, target.architecture, build_target(recipe, target), dataset)
    train(trainer)
    steps, consumed = [], 0
    while (step := trainer.schedule.step(consumed)) is not None:
        steps.append(dataset.train[step.examples].tolist())
        consumed = step.consumed_samples
    return steps


def refusal_in_order(recipe: Recipe) -> str:
    try:
        train_in_order(recipe, 2)
    except UserError as error:
        return str(error)
    return "accepted"


def test_training_keeps_to_the_order_and_a_checkpoint_to_its_curriculum(ranks, copied: Recipe) -> None:  # type: ignore[no-untyped-def]
    recipe = built(copied, "gt_length")
    (steps,) = ranks(1, train_in_order, recipe, 1)
    dataset = FusionDataset(recipe)
    lengths = dataset.supervised_tokens("training")
    epochs = np.concatenate(steps).reshape(-1, len(dataset.train))
    assert len(epochs) == sum(phase.epochs for phase in recipe.phases)
    for epoch in epochs:
        assert lengths[epoch].tolist() == sorted(lengths[dataset.train].tolist())
        assert sorted(epoch) == dataset.train.tolist()  # and so no validation example

    (facts,) = recipe.workdir.rglob("facts.json")
    run = json.loads(facts.read_text())["run"]
    assert (run["order"], run["curriculum"]) == ("gt_length", order_of(recipe).sha256)
    (message,) = ranks(1, refusal_in_order, ordered(recipe, "shuffled"))
    assert (
        "order = 'gt_length', but this run has order = 'shuffled'" in message and "another --save" in message
    )

    def lengthen(arrays: dict, header: dict) -> None:
        arrays["gt_tokens"][dataset.train[0]] += 1000

    rewrite(recipe, lengthen)
    (message,) = ranks(1, refusal_in_order, recipe)
    assert "curriculum = " in message and "another --save" in message
