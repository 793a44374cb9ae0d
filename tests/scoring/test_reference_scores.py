"""The measures against the ground truth as an artifact: what is stored, what it depends on, and what the
manifest says.
"""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe, ReferenceOptions
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring import reference_scores as stage
from megatron_fuse.scoring.reference_scores import (
    REFERENCE_SCORES,
    load_reference_scores,
    require_measures,
    score_against_reference,
)
from megatron_fuse.stages import Context

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

TRUTHS = ["the quick brown fox jumps", "it is forty two", "pear apple fig", "no", "a lazy dog sleeps here"]
ANSWERS = {
    "same": TRUTHS,
    "other": ["something else entirely here", "it is forty three", "", "no", "a lazy dog"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def answered(model: Path, root: Path, **reference: object) -> Recipe:
    rows = [{"id": str(n), "instruction": f"Question {n}", "output": text} for n, text in enumerate(TRUTHS)]
    sources = {}
    for name, texts in ANSWERS.items():
        path = write_rows(
            root / f"{name}.jsonl", [{"id": str(n), "response": text} for n, text in enumerate(texts)]
        )
        sources[name] = {"model": str(model), "responses": str(path)}
    recipe = small_recipe(
        root / "run",
        write_rows(root / "data.jsonl", rows),
        model,
        sources,
        data={"shard_size": 2},
        schedule={"preset": "profuser"},
        selection={"inference": "reference"},
        reference={"without_bertscore": "renormalize", **reference},
    )
    prepare_instructions(Context(recipe))
    for name in sources:
        generate_responses(Context(recipe), name)
    return recipe


def test_measures_are_stored_in_example_order_and_the_manifest_says_what_is_left_out(
    model: Path, tmp_path: Path
) -> None:
    recipe = answered(model, tmp_path)
    artifacts = score_against_reference(Context(recipe))
    assert [artifact.counts for artifact in artifacts] == [
        {"examples": 5, "unscored": 0},
        {"examples": 5, "unscored": 1},
    ]
    assert "left out" in artifacts[0].manifest["options"]["bertscore"]
    assert set(artifacts[0].manifest["options"]["packages"]) == {"sacrebleu", "rouge-score"}
    same, other = (load_reference_scores(Context(recipe), name) for name in ANSWERS)
    assert same.dtype == other.dtype == np.float32
    assert same.shape == other.shape == (5, 3)
    np.testing.assert_allclose(same[:, :2], 1, atol=1e-6)
    assert np.isnan(same[:, 2]).all()
    assert np.isnan(other[2]).all()  # an empty answer
    # Longest common subsequences of 3 of 4 words, of 1 of 1, of 3 of 3 against 5 words; nothing in common.
    np.testing.assert_allclose(other[[0, 1, 3, 4], 1], [0.0, 0.75, 1.0, 0.75], atol=1e-6)


def test_weights_are_no_part_of_the_artifact(model: Path, tmp_path: Path) -> None:
    recipe = answered(model, tmp_path)
    weighed = recipe.reference.model_copy(update={"bleu": 0.7, "rouge_l": 0.1})
    other = recipe.model_copy(update={"reference": weighed})
    assert Context(other).plan(REFERENCE_SCORES, "same") == Context(recipe).plan(REFERENCE_SCORES, "same")


def test_a_model_for_bertscore_is_part_of_it(model: Path, tmp_path: Path) -> None:
    plans = [
        Context(answered(model, tmp_path, bertscore_model=str(model), **layer)).plan(REFERENCE_SCORES, "same")
        for layer in ({}, {"bertscore_layer": 1})
    ]
    assert [plan.options["bertscore"] for plan in plans] == [{"layer": None}, {"layer": 1}]
    assert "bert-score" in plans[0].options["packages"]
    assert {"bertscore model", "bertscore tokenizer", "responses"} == set(plans[0].inputs)


def test_without_a_model_it_goes_on_only_on_request(model: Path, tmp_path: Path) -> None:
    recipe = answered(model, tmp_path, without_bertscore="refuse")
    for use in (score_against_reference, lambda context: load_reference_scores(context, "same")):
        with pytest.raises(UserError, match=r"reference.without_bertscore to renormalize"):
            use(Context(recipe))
    assert not (tmp_path / "run/scores").exists()


def test_another_version_of_a_package_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = answered(model, tmp_path)
    score_against_reference(Context(recipe))
    monkeypatch.setattr(stage, "version", lambda package: f"0 of {package}")
    with pytest.raises(UserError, match=r"options\.packages = .*0 of rouge-score"):
        score_against_reference(Context(recipe))
    load_reference_scores(Context(recipe), "same")  # which needs no package


@pytest.mark.parametrize("missing", ["sacrebleu", "rouge-score", "bert-score", "none"])
@pytest.mark.parametrize("encoder", [None, "an encoder"])
def test_a_missing_package_is_found_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, missing: str, encoder: str | None
) -> None:
    def version(package: str) -> str:
        if package == missing:
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(stage, "version", version)
    options = ReferenceOptions(bertscore_model=encoder, without_bertscore="renormalize")
    if missing == "none" or (missing == "bert-score" and not encoder):  # which compares nothing without one
        require_measures(options)
    else:
        with pytest.raises(
            UserError, match=rf"^{missing} is not installed\. Run pip install 'megatron-fuse\[reference\]'"
        ):
            require_measures(options)


def test_missing_scores_name_the_command(model: Path, tmp_path: Path) -> None:
    recipe = answered(model, tmp_path)
    with pytest.raises(
        UserError,
        match=r"scores/same/reference does not exist\. Run megatron-fuse score --source same --reference",
    ):
        load_reference_scores(Context(recipe), "same")
