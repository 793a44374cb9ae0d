"""A source that joins later runs its own stages and no others, and a recipe with missing files is refused at once."""

from pathlib import Path

import pytest
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.advantage.scores import score_responses
from megatron_fuse.capture import capture
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data import FusionDataset, build_fusion_data, modes_with_teacher
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.pipeline import check_files, data_stages
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses


def run_data_stages(recipe: Recipe) -> None:
    prepare_instructions(recipe)
    for source in recipe.sources:
        generate_responses(recipe, source)
    for judge in recipe.reward_models:
        score_responses(recipe, judge, list(recipe.sources))
    for source in recipe.sources:
        for mode in modes_with_teacher(recipe):
            capture(recipe, source, mode)
    build_fusion_data(recipe)


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of writing and its bytes."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def parts(tmp_path: Path) -> dict:
    rows = [{"instruction": f"Add {i} and {i + 1}.", "output": f"That makes {2 * i + 1}."} for i in range(10)]
    families = {"alpha": "llama", "beta": "mpt", "gamma": "gpt_neox"}
    return {
        "data": write_rows(tmp_path / "data.jsonl", rows),
        "judge": save_model(tmp_path / "judge", "llama", reward=True),
        **{name: save_model(tmp_path / name, family, seed=i) for i, (name, family) in enumerate(families.items())},
    }


def recipe_of(tmp_path: Path, parts: dict, *sources: str) -> Recipe:
    return small_recipe(
        tmp_path / "work",
        parts["data"],
        parts["alpha"],
        {name: parts[name] for name in sources},
        reward_models={"judge": {"model": str(parts["judge"]), "dtype": "fp32"}},
        schedule={"preset": "profuser"},
        responses={"max_new_tokens": 8},
    )


def test_a_source_that_joins_later_runs_only_its_own_stages(tmp_path: Path, parts: dict) -> None:
    two, three = recipe_of(tmp_path, parts, "alpha", "beta"), recipe_of(tmp_path, parts, "alpha", "beta", "gamma")
    run_data_stages(two)
    assert all(stage.is_done() for stage in data_stages(two))
    before = files(two.workdir)
    to_do = {work.name for stage in data_stages(three) for work in stage.works if work.state() != "done"}
    assert to_do == {
        "responses/gamma",
        "scores/gamma/judge",
        "captures/gamma/inference",
        "captures/gamma/training",
        "fusion/exact-skip-T2/teachers/gamma/inference",
        "fusion/exact-skip-T2/teachers/gamma/training",
    }
    run_data_stages(three)
    after = files(three.workdir)
    changed = {name for name in after if before.get(name) != after[name]}
    assert all("gamma" in name or "/selection/" in name or name.endswith("/recipe.yaml") for name in changed), changed
    assert before.keys() <= after.keys()
    FusionDataset(three)


def test_changed_options_are_refused_and_name_both_values(tmp_path: Path, parts: dict) -> None:
    recipe = recipe_of(tmp_path, parts, "alpha")
    run_data_stages(recipe)
    other = recipe.model_copy(update={"capture": recipe.capture.model_copy(update={"top_k": 7})})
    (captures,) = [stage for stage in data_stages(other) if stage.name == "captures"]
    with pytest.raises(UserError, match=r"top_k = 10, but now .*top_k = 7"):
        captures.works[0].state()


def test_all_missing_files_are_named_at_once(tmp_path: Path, parts: dict) -> None:
    recipe = small_recipe(tmp_path / "w", tmp_path / "no.jsonl", tmp_path / "nothing", {"a": tmp_path / "nowhere"})
    with pytest.raises(UserError) as caught:
        check_files(recipe)
    for name in ("no.jsonl", "target.model", "sources.a.model"):
        assert name in str(caught.value)
