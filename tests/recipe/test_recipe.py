"""A recipe is refused with the path of the wrong key and what is allowed there, and printing it loses nothing."""

from pathlib import Path

import pytest
import yaml

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import PRESETS, dump_recipe, load_recipe, make_recipe

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "workdir": "w",
    "target": {"model": "t"},
    "sources": {"a": {"model": "a"}, "b": {"model": "b"}},
    "reward_models": {"j": {"model": "j"}},
    "data": {"path": "d.jsonl"},
    "schedule": {"preset": "profuser"},
}


def with_change(path: str, value: object) -> dict:
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *outer, last = path.split(".")
    place = content
    for key in outer:
        place = place.setdefault(key, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.lerning_rate", 1, r"training\.lerning_rate: unknown key; allowed here: .*seq_length"),
        ("sources.b.modell", "x", r"sources\.b\.modell: unknown key; allowed here: model,"),
        ("training.micro_batch_size", "two", r"training\.micro_batch_size: .*integer.*given: 'two'"),
        ("training.lr", -1, r"training\.lr: .*greater than 0"),
        ("loss.tail", "bukket", r"loss\.tail: .*'bucket', 'renormalize' or 'ignore'"),
        ("data.path", None, r"data\.path: required"),
        ("schedule.preset", "x", r"schedule\.preset: .*'profuser'"),
        ("schedule.phases", [], r"schedule: give exactly one of preset and phases"),
        ("sources", {"../up": {"model": "a"}}, r"sources\.\.\./up"),
        ("reward_models", {}, r"reward_models is empty"),
        ("selection.strongest", "k", r"selection\.strongest is 'k'.*\['j'\]"),
        ("capture.temperatures", [1.0], r"teacher_temperature is 2\.0 but capture\.temperatures"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(path: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(with_change(path, value))


def test_a_phase_that_learns_nothing_is_refused() -> None:
    content = with_change("schedule", {"phases": [{"name": "idle", "epochs": 1, "training": {"lambda": 1}}]})
    with pytest.raises(UserError, match=r"schedule\.phases\.0: both modes have weight 0"):
        make_recipe(content)


def test_printing_and_reading_back_gives_the_same_recipe() -> None:
    recipe = make_recipe(MINIMAL)
    assert make_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_free_phases_say_what_presets_say() -> None:
    phases = [phase.model_dump(by_alias=True) for phase in PRESETS["profuser"]]
    assert make_recipe(with_change("schedule", {"phases": phases})).phases == PRESETS["profuser"]


def test_flags_with_megatron_names_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    flags = (
        "--tensor-model-parallel-size 2 --lr 1e-4 --seq-length 64 --no-loss-temperature-squared --schedule-preset csft"
    )
    recipe = load_recipe(argv=["--recipe", str(path), *flags.split()])
    assert recipe.parallel.tensor_model_parallel_size == 2
    assert (recipe.training.lr, recipe.training.seq_length) == (1e-4, 64)
    assert recipe.phases == PRESETS["csft"]


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "workdir: {"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(argv=["--recipe", str(path)])


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_recipes_are_valid(path: Path) -> None:
    make_recipe(yaml.safe_load(path.read_text()), str(path))
