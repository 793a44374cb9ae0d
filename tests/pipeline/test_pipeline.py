"""Only what a recipe uses is planned, a source that joins later runs its own stages and no others, and a
recipe with missing files is refused at once."""

import re
import shutil
from pathlib import Path

import pytest
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.capture import capture
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.pipeline import STAGES, Work, check_files, steps
from megatron_fuse.pipeline.estimates import estimate_amounts
from megatron_fuse.pipeline.plan_table import print_plan
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring.scores import score_responses
from megatron_fuse.selection.choice import selection_path
from megatron_fuse.stages import Context
from megatron_fuse.training.stage import EXPORT, TRAINING

ROOT = Path(__file__).parents[2]


def run_data_stages(recipe: Recipe) -> None:
    prepare_instructions(Context(recipe))
    for name in recipe.answering:
        generate_responses(Context(recipe), name)
    for reward_model in recipe.voting_reward_models:
        score_responses(Context(recipe), reward_model)
    for source in recipe.sources:
        for mode in recipe.modes_with_teacher:
            capture(Context(recipe), source, mode)
    build_fusion_data(Context(recipe))


def to_do(recipe: Recipe) -> set[str]:
    """Labels of the artifacts before training that are not done."""
    context = Context(recipe)
    data = [
        work for works in steps(recipe).values() for work in works if work.stage not in (TRAINING, EXPORT)
    ]
    return {work.label(recipe) for work in data if work.state(context) != "done"}


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of writing and its bytes."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("parts")
    rows = [{"instruction": f"Add {i} and {i + 1}.", "output": f"That makes {2 * i + 1}."} for i in range(10)]
    families = {"alpha": "llama", "beta": "mpt", "gamma": "gpt_neox"}
    return {
        "data": write_rows(directory / "data.jsonl", rows),
        "reward": save_model(directory / "reward", "llama", reward=True),
        **{
            name: save_model(directory / name, family, seed=i)
            for i, (name, family) in enumerate(families.items())
        },
    }


def recipe_of(tmp_path: Path, parts: dict, *sources: str) -> Recipe:
    return small_recipe(
        tmp_path / "work",
        parts["data"],
        parts["alpha"],
        {name: parts[name] for name in sources},
        reward_models={"reward": {"model": str(parts["reward"]), "dtype": "fp32"}},
        schedule={"preset": "profuser"},
        responses={"max_new_tokens": 8},
    )


def test_a_source_that_joins_later_runs_only_its_own_stages(tmp_path: Path, parts: dict) -> None:
    two, three = (
        recipe_of(tmp_path, parts, "alpha", "beta"),
        recipe_of(tmp_path, parts, "alpha", "beta", "gamma"),
    )
    run_data_stages(two)
    assert not to_do(two)
    before = files(two.workdir)
    fusion = "fusion/exact-skip-T2"
    chosen = {
        str(selection_path(three, mode).relative_to(three.workdir)) for mode in ("inference", "training")
    }
    assert to_do(three) == chosen | {
        "responses/gamma",
        "scores/gamma/reward",
        "captures/gamma/inference",
        "captures/gamma/training",
        f"{fusion}/teachers/gamma/inference",
        f"{fusion}/teachers/gamma/training",
    }
    run_data_stages(three)
    after = files(three.workdir)
    changed = {name for name in after if before.get(name) != after[name]}
    always = ("/recipe.yaml", "/curriculum-shuffled.safetensors")  # small, and written anew by every build
    assert all("gamma" in name or "/selection/" in name or name.endswith(always) for name in changed), changed
    assert before.keys() <= after.keys()
    FusionDataset(three)


def test_changed_options_are_refused_and_name_both_values(tmp_path: Path, parts: dict) -> None:
    recipe = recipe_of(tmp_path, parts, "alpha")
    run_data_stages(recipe)
    other = recipe.model_copy(update={"capture": recipe.capture.model_copy(update={"top_k": 7})})
    with pytest.raises(UserError, match=r"top_k = 10, but now .*top_k = 7"):
        steps(other)["captures"][0].state(Context(other))


SERVER = {"url": "http://localhost:1/v1", "model": "served", "api_key_variable": "NO_SUCH_KEY"}


def works(recipe: Recipe, stage: str) -> dict[str, Work]:
    return {work.label(recipe): work for work in steps(recipe).get(stage, [])}


@pytest.mark.parametrize("order", ["shuffled", "gt_length", "target_reward"])
@pytest.mark.parametrize("rule", ["vote", "reference"])
@pytest.mark.parametrize("preset", ["csft", "fuse", "profuser"])
@pytest.mark.parametrize("target", ["alpha", "gamma"])  # a source, and none
def test_the_plan_is_of_all_answers_and_scores_that_are_used(
    tmp_path: Path, parts: dict, target: str, preset: str, rule: str, order: str
) -> None:
    recipe = small_recipe(
        tmp_path / "work",
        parts["data"],
        parts[target],
        {name: parts[name] for name in ("alpha", "beta")},
        reward_models={name: {"model": str(parts["reward"])} for name in ("one", "two", "three")},
        selection={"reward_models": ["two", "one"], "strongest": "two", "inference": rule},
        schedule={"preset": preset, "order": order},
    )
    uses_answers = preset == "profuser"
    own = "alpha" if target == "alpha" else "target"
    answering = {"alpha", "beta"} if uses_answers else set()
    scored = {(name, "reference") for name in answering}
    if rule == "vote":
        scored = {(name, reward_model) for name in answering for reward_model in ("one", "two")}
    if order == "target_reward":
        answering, scored = answering | {own}, scored | {(own, "two")}
    assert works(recipe, "responses").keys() == {f"responses/{name}" for name in answering}
    assert works(recipe, "scores").keys() == {f"scores/{name}/{scorer}" for name, scorer in scored}
    names = list(steps(recipe))
    assert ("responses" in names, "scores" in names) == (bool(answering), bool(scored))
    assert ("captures" in names) == (preset != "csft")
    for last, name in enumerate(names):
        assert list(steps(recipe, name)) == names[: last + 1]
    with pytest.raises(ValueError, match="no such step"):
        steps(recipe, "no such step")


def test_what_is_made_elsewhere_costs_no_computation_here(tmp_path: Path, parts: dict) -> None:
    given = write_rows(tmp_path / "given.jsonl", [{"id": "x", "response": "y"}])
    options = {
        "alpha": {"model": str(parts["alpha"])},
        "beta": {"model": str(parts["beta"]), "responses": str(given), "captures": {"training": str(given)}},
        "gamma": {"model": str(parts["gamma"]), "server": SERVER},
    }
    recipe = small_recipe(
        tmp_path / "work",
        parts["data"],
        parts["alpha"],
        options,
        reward_models={"reward": {"model": str(parts["reward"])}, "file": {"scores": str(given)}},
        schedule={"preset": "profuser"},
    )
    check_files(recipe)  # a key for the server may be set or not: many servers ask for none
    stages = ("responses", "scores", "captures")
    context = Context(recipe)
    amounts = estimate_amounts(context)
    free = {
        name
        for stage in stages
        for name, work in works(recipe, stage).items()
        if work.flops(context, amounts) == 0
    }
    assert free == {
        "responses/beta",
        "responses/gamma",
        "captures/beta/training",
        *(f"scores/{name}/file" for name in options),
    }


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    recipe = small_recipe(
        tmp_path / "w",
        tmp_path / "no.jsonl",
        tmp_path / "nothing",
        {
            "a": {"model": nowhere, "responses": nowhere, "captures": {"training": nowhere}},
            "b": {"model": nowhere, "server": SERVER},
        },
        reward_models={
            "model": {"model": nowhere},
            "body": {"model": str(tmp_path), "body": nowhere},
            "file": {"scores": nowhere},
        },
        reference={"bertscore_model": nowhere},
    )
    with pytest.raises(UserError) as caught:
        check_files(recipe)
    keys = [
        "data.path",
        "target.model",
        "sources.a.model",
        "sources.a.responses",
        "sources.a.captures.training",
        "sources.b.model",
        "reward_models.model.model",
        "reward_models.body.body",
        "reward_models.file.scores",
        "reference.bertscore_model",
    ]
    problems = str(caught.value).split("\n       ")
    assert sorted(problem.partition(":")[0] for problem in problems) == sorted(keys)


def test_a_reference_without_its_encoder_is_refused_before_anybody_answers(
    tmp_path: Path, parts: dict
) -> None:
    sections = {"selection": {"inference": "reference"}, "schedule": {"preset": "profuser"}}
    sources = {name: parts[name] for name in ("alpha", "beta")}
    recipe = small_recipe(tmp_path / "w", parts["data"], parts["alpha"], sources, **sections)
    with pytest.raises(UserError, match=r"there is no reference\.bertscore_model"):
        check_files(recipe)
    without = {"without_bertscore": "renormalize"}
    check_files(
        small_recipe(tmp_path / "w", parts["data"], parts["alpha"], sources, reference=without, **sections)
    )


def test_a_plan_of_damaged_weights_is_a_whole_table(
    tmp_path: Path, parts: dict, capsys: pytest.CaptureFixture
) -> None:
    damaged = {name: Path(shutil.copytree(parts[name], tmp_path / name)) for name in ("alpha", "beta")}
    for directory in damaged.values():
        (directory / "model.safetensors").write_bytes(b"\xff" * 100)
    # Alpha is the target as well.
    recipe = recipe_of(tmp_path, {**parts, **damaged}, "alpha", "beta", "gamma")
    with pytest.raises(UserError) as refusal:
        print_plan(Context(recipe), 1)
    for directory in damaged.values():
        assert str(refusal.value).count(f"{directory / 'model.safetensors'} is not a complete") == 1
    states = {
        line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line.split()
    }
    assert states["responses/alpha"] == states["responses/beta"] == states["training"] == "refused"
    assert states["responses/gamma"] == states["export"] == "to"


def test_the_slurm_script_runs_the_data_stages_in_their_order() -> None:
    script = (ROOT / "examples/slurm/data_stages.sbatch").read_text()
    looped = re.findall(r"for stage in ([\w ]+);", script)[0]
    alone = re.findall(r"^megatron-fuse (\w+)", script, re.M)
    data = [stage for stage in STAGES if stage not in (TRAINING, EXPORT)]
    assert [alone[0], *looped.split(), *alone[1:]] == list(dict.fromkeys(stage.module[-1] for stage in data))
