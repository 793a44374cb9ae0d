"""An old name of a key is read for one release, in a file and as a flag; the new name is recommended, both
are refused.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.layers import load_experiment, variant_recipe
from megatron_fuse.recipe import Recipe, dump_recipe, load_recipe, make_recipe, renamed
from megatron_fuse.recipe.loading import _flag
from megatron_fuse.recipe.renamed import RENAMED

MINIMAL: dict[str, Any] = {
    "workdir": "w",
    "target": {"model": "m"},
    "sources": {"a": {"model": "m"}},
    "reward_models": {"i": {"model": "m"}, "j": {"model": "m"}},
    "data": {"path": "d"},
    "schedule": {"preset": "csft"},
}
# Old key -> (value of it, the same value as texts of a flag, another value)
VALUES: dict[tuple[str, ...], tuple[Any, list[str], Any]] = {
    ("selection", "judges"): (["j"], ["j"], ["i"]),
    ("data", "held_out"): (3, ["3"], 5),
}
EACH = pytest.mark.parametrize("old", RENAMED, ids=".".join)


def with_key(key: tuple[str, ...], value: Any, content: dict[str, Any] = MINIMAL) -> dict[str, Any]:
    section, name = key
    return content | {section: content.get(section, {}) | {name: value}}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def from_file(path: Path, *flags: str) -> Recipe:
    return load_recipe(argv=["--recipe", str(path), *flags])


@EACH
def test_an_old_key_in_a_file_is_read_as_the_new_one_with_a_warning(
    tmp_path: Path, old: tuple[str, ...]
) -> None:
    value, _, _ = VALUES[old]
    path, new = write(tmp_path / "r.yaml", with_key(old, value)), ".".join(RENAMED[old])
    line = 1 + next(
        n for n, line in enumerate(path.read_text().splitlines()) if line.strip().startswith(f"{old[1]}:")
    )
    with pytest.warns(
        FutureWarning, match=rf"r\.yaml:{line}: {'.'.join(old)} is deprecated: write {new}\."
    ) as caught:
        recipe = from_file(path)
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        assert recipe == make_recipe(with_key(RENAMED[old], value))
        assert recipe == make_recipe(yaml.safe_load(dump_recipe(recipe)))


@EACH
def test_an_old_flag_is_read_as_the_new_one_with_a_warning(tmp_path: Path, old: tuple[str, ...]) -> None:
    value, texts, other = VALUES[old]
    flag, new_flag, new = _flag(*old), _flag(*RENAMED[old]), RENAMED[old]
    # The flag overrides the file, whichever name each has.
    path = write(tmp_path / "r.yaml", with_key(new, other))
    with pytest.warns(FutureWarning, match=f"^{flag} is deprecated: write {new_flag}"):
        assert from_file(path, flag, *texts) == make_recipe(with_key(new, value))
    path = write(tmp_path / "r.yaml", with_key(old, other))
    with pytest.warns(FutureWarning):
        assert from_file(path, new_flag, *texts) == make_recipe(with_key(new, value))


@EACH
def test_both_names_are_refused(tmp_path: Path, old: tuple[str, ...]) -> None:
    value, texts, _ = VALUES[old]
    path, new = (
        write(tmp_path / "both.yaml", with_key(RENAMED[old], value, with_key(old, value))),
        RENAMED[old],
    )
    message = (
        rf"both\.yaml:\d+: {'.'.join(old)}: the old name of {'.'.join(new)}, which is given too: leave out"
    )
    with pytest.raises(UserError, match=message):
        from_file(path)
    flag, new_flag = _flag(*old), _flag(*new)
    path = write(tmp_path / "r.yaml", MINIMAL)
    with pytest.raises(
        UserError, match=f"^{flag}: the old name of {new_flag}, which is given too: leave out {flag}"
    ):
        from_file(path, flag, *texts, new_flag, *texts)


@EACH
def test_an_error_about_an_old_key_names_what_is_in_the_file(tmp_path: Path, old: tuple[str, ...]) -> None:
    path = write(tmp_path / "r.yaml", with_key(old, {"a": 1}))
    with pytest.warns(FutureWarning), pytest.raises(UserError, match=rf"r\.yaml:\d+: {'.'.join(old)}: "):
        from_file(path)


@EACH
def test_layers_of_an_experiment_fit_on_each_other_by_either_name(
    tmp_path: Path, old: tuple[str, ...]
) -> None:
    value, _, other = VALUES[old]
    recipe = write(tmp_path / "r.yaml", with_key(old, other))
    experiment = {
        "recipe": str(recipe),
        "workdir": str(tmp_path / "w"),
        "results": str(tmp_path / "r.csv"),
        "seeds": [1],
        "evaluate": "true {model} {output} {split} {seed}",
        "metrics": {"m": "m"},
        "variants": {
            "of_recipe": {},
            "by_old": {old[0]: {old[1]: value}},
            "by_new": {old[0]: {RENAMED[old][1]: value}},
        },
        "tables": {"t": {"title": "t", "baseline": "by_old", "rows": ["by_new"]}},
    }
    with pytest.warns(FutureWarning):
        loaded = load_experiment(write(tmp_path / "e.yaml", experiment))
        recipes = {name: variant_recipe(loaded, name, 1) for name in experiment["variants"]}
    section, key = RENAMED[old]
    found = {name: getattr(getattr(recipe, section), key) for name, recipe in recipes.items()}
    assert found == {"of_recipe": other, "by_old": value, "by_new": value}


@EACH
def test_a_recorded_recipe_of_old_names_is_the_recipe_of_new_names(old: tuple[str, ...]) -> None:
    value, _, _ = VALUES[old]
    recorded = make_recipe(with_key(RENAMED[old], value)).model_dump(mode="json", by_alias=True)
    section, key = RENAMED[old]
    older = recorded | {section: {old[1] if k == key else k: v for k, v in recorded[section].items()}}
    assert older != recorded and renamed(older) == recorded == renamed(recorded)
    assert list(renamed(older)[section]) == list(recorded[section])
