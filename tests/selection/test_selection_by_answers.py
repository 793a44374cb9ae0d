"""The rules that let the sources' own answers decide: the winner, and the best source of a category."""

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_fusion import SOURCES, fusion_recipe, run_before_fusion, save_models, write_data
from small_models import write_rows

from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.inspection.documents import format_view, view_document
from megatron_fuse.instructions import INSTRUCTIONS, load_examples, prepare_instructions
from megatron_fuse.recipe import Margin, Recipe
from megatron_fuse.recipe.stage_options import SelectionOptions
from megatron_fuse.report.advantage import write_advantage_report
from megatron_fuse.report.advantage.charts import rule_in_words
from megatron_fuse.selection.choice import _by_category
from megatron_fuse.selection.margins import category_margin
from megatron_fuse.selection.rules import NONE, best_in_category, category_scores, winner_if_able
from megatron_fuse.stages import Context
from megatron_fuse.verification import verify_fusion_data

NAN = np.nan


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_category_scores_are_the_rule_in_words(data: st.DataObject) -> None:
    examples, sources, models = (data.draw(st.integers(low, 4)) for low in (1, 1, 0))
    score = st.sampled_from([0.0, 1.0, 2.5, NAN])
    scores = data.draw(arrays(np.float32, (examples, sources, models), elements=score))
    categories = data.draw(arrays(np.int32, examples, elements=st.integers(0, 2)))
    counted = data.draw(arrays(np.bool_, examples))
    found = category_scores(scores, categories, counted)
    for n in range(examples):
        rows = [i for i in range(examples) if categories[i] == categories[n]]
        rows = [i for i in rows if counted[i]] or rows
        for source in range(sources):
            parts = []
            for model in range(models):
                all_scores = [x for x in scores[..., model].ravel().tolist() if x == x]
                given_scores = [x for x in scores[counted, :, model].ravel().tolist() if x == x] or all_scores
                deviation = np.std(given_scores) if given_scores else 0
                values = [float(scores[i, source, model]) for i in rows]
                filled = [min(given_scores) if np.isnan(v) else v for v in values] if given_scores else []
                parts.append(np.mean(filled) / deviation if deviation > 0 else 0)
            assert found[n, source] == pytest.approx(np.mean(parts) if parts else 0, abs=1e-9)


def test_a_reward_model_of_another_scale_weighs_the_same() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(40, 3, 2)).astype(np.float32)
    categories = np.arange(40) % 4
    wide, everything = scores * np.array([1, 1000], np.float32), np.ones(40, bool)
    found = category_scores(wide, categories, everything)
    np.testing.assert_allclose(found, category_scores(scores, categories, everything), rtol=1e-5)


def test_the_best_able_source_of_the_category_and_its_margin() -> None:
    means = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [1.0, 1.0, 0.0], [5.0, 4.0, 3.0]])
    able = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    source = best_in_category(means, able)
    assert source.tolist() == [1, 2, 0, NONE]
    margin = category_margin(means, able, source)
    assert margin[:3].tolist() == [1, 1, 0]
    assert np.isnan(margin[3])


def test_a_winner_that_has_not_read_the_ground_truth_teaches_nothing() -> None:
    able = np.array([[1, 0], [1, 0], [0, 1]], bool)
    assert winner_if_able(np.array([0, 1, NONE], np.int16), able).tolist() == [0, NONE, NONE]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """All stages before fusion data, for a recipe that learns from both modes."""
    root = tmp_path_factory.mktemp("by_answers")
    write_data(root)
    recipe = fusion_recipe(root, save_models(root))
    run_before_fusion(recipe)
    return recipe


def with_rules(recipe: Recipe, preset: str, **selection: object) -> Recipe:
    schedule = recipe.schedule.model_copy(update={"preset": preset})
    chosen = recipe.selection.model_copy(update=selection)
    return recipe.model_copy(update={"schedule": schedule, "selection": chosen})


def built(recipe: Recipe) -> FusionDataset:
    build_fusion_data(Context(recipe))
    assert verify_fusion_data(Context(recipe)).problems == []
    return FusionDataset(recipe)


def test_the_winner_of_the_answers_teaches_the_ground_truth(fused: Recipe) -> None:
    both = built(with_rules(fused, "profuser", training="winner"))
    answers, truth = both.selections["inference"], both.selections["training"]
    won = answers.source != NONE
    assert won.sum() > 3
    assert len(set(truth.source.tolist())) > 2
    able = np.take_along_axis(np.isfinite(truth.arrays["ce_sum"]), np.maximum(answers.source, 0)[:, None], 1)[
        :, 0
    ]
    # The vote here is also over answers that are not available as rows, so that only common winners are
    # compared.
    available = answers.arrays["available"].all(1)
    assert (available & won & able).sum() > 3
    rows = available & won & able
    assert truth.source[rows].tolist() == answers.source[rows].tolist()
    np.testing.assert_array_equal(truth.arrays["margin"][rows], answers.arrays["margin"][rows])


def test_the_same_choice_without_learning_from_answers(fused: Recipe) -> None:
    """`fuse` learns from no answer, so it needs scores but no captures of answers."""
    both = built(with_rules(fused, "profuser", training="winner"))
    alone = with_rules(fused, "fuse", training="winner")
    assert alone.modes_with_teacher == ["training"]
    assert set(alone.answering) == set(SOURCES)
    found = built(alone)
    assert found.selections["training"].source.tolist() == both.selections["training"].source.tolist()


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_the_best_source_of_a_category_wins_it(fused: Recipe, mode: str) -> None:
    dataset = built(with_rules(fused, "profuser", **{mode: "by_category"}))
    examples = load_examples(Context(fused).open(INSTRUCTIONS))
    arrays, source = dataset.selections[mode].arrays, dataset.selections[mode].source
    names = [example.category for example in examples]
    for name in set(names):
        rows = np.array([n for n, category in enumerate(names) if category == name])
        means = arrays["category_score"][rows]
        assert (means == means[0]).all()
        usable = arrays["available"][rows].astype(bool)
        if mode == "inference":
            usable &= ~np.isnan(arrays["scores"][rows]).any(2)
        else:
            usable &= np.isfinite(arrays["ce_sum"][rows])
        best = int(means[0].argmax())
        assert all(source[row] == best for row, can in zip(rows, usable[:, best], strict=True) if can)


def test_a_margin_in_standard_deviations_drops_a_category_without_a_clear_best(fused: Recipe) -> None:
    dataset = built(with_rules(fused, "fuse", training="by_category"))
    margin = dataset.selections["training"].arrays["margin"]
    at_least = float(np.nanmean(margin)) + 1e-6
    recipe = with_rules(fused, "fuse", training="by_category", training_margin=Margin(at_least=at_least))
    weight = built(recipe).selections["training"].weight
    assert weight.tolist() == [0.0 if value < at_least else 1.0 for value in margin]
    assert 0 < weight.sum() < len(weight)


def test_rows_without_a_category_are_refused(tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = [{"id": f"e{n}", "instruction": f"Question {n}?", "output": "Yes."} for n in range(13)]
    write_rows(tmp_path / "data.jsonl", rows)
    recipe = fusion_recipe(tmp_path, save_models(tmp_path))
    run_before_fusion(recipe)
    by_category = Context(with_rules(recipe, "fuse", training="by_category"))
    refused = pytest.raises(UserError, match=r"data\.jsonl: no example has a category.*choose another rule")
    # Before the sources answer, whether the instructions are there already or not; and in a build alone.
    with refused:
        prepare_instructions(by_category)
    with refused:
        build_fusion_data(by_category)
    shutil.rmtree(recipe.workdir / "instructions")
    with refused:
        prepare_instructions(by_category)
    assert prepare_instructions(Context(with_rules(recipe, "csft", training="by_category"))) is not None


def test_without_a_reward_model_the_rule_is_refused(fused: Recipe) -> None:
    content = with_rules(fused, "fuse", training="by_category").model_dump(by_alias=True, mode="json")
    with pytest.raises(ValueError, match=r"by_category.*no reward model votes"):
        Recipe.model_validate(content | {"reward_models": {}})


def test_scores_of_validation_rows_and_of_other_sources_decide_nothing(fused: Recipe) -> None:
    """What the choice reads is changed in memory: a wild score of a row or source that does not count."""
    recipe = with_rules(fused, "fuse", training="by_category", sources=["alpha", "beta"])
    dataset = built(recipe)
    arrays = dataset.selections["training"].arrays
    assert arrays["validation"].sum() == 3
    evidence = {name: arrays[name].copy() for name in ("scores", "category", "validation")}
    able = np.isfinite(arrays["ce_sum"])
    before = _by_category(recipe, able, **evidence)
    assert before["source"].tolist() == arrays["source"].tolist()
    gamma = list(recipe.sources).index("gamma")
    evidence["scores"][:, gamma] = -1e6
    evidence["scores"][evidence["validation"] == 1, 0] = 1e3
    after = _by_category(recipe, able, **evidence)
    assert after["source"].tolist() == before["source"].tolist()


RULES = [
    *(
        ("fuse", {"training": rule})
        for rule in get_args(SelectionOptions.model_fields["training"].annotation)
    ),
    *(("profuser", {"inference": rule}) for rule in ("vote", "by_category", "random")),
]


@pytest.mark.parametrize(("preset", "selection"), RULES)
def test_every_rule_has_words_in_inspection_and_report(
    fused: Recipe, preset: str, selection: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No rule has a picture of its own.
    monkeypatch.setattr("megatron_fuse.report.advantage.save_picture", lambda *_: b"")
    recipe = with_rules(fused, preset, **selection)
    dataset = built(recipe)
    mode, rule = next(iter(selection.items()))
    assert rule_in_words({"rules": selection, "reward_models": None}, mode)
    example = int(np.flatnonzero(dataset.selections[mode].source != NONE)[0])
    text = format_view(view_document(recipe, dataset, mode, example), dataset)
    units = {"winner": "votes", "by_category": "standard deviations of the scores", "vote": "votes"}
    assert units.get(rule, "nats per byte" if mode == "training" else "of score") in text
    if rule in units or mode == "inference":  # the others' reports differ in the rule's name alone
        assert write_advantage_report(Context(recipe))
