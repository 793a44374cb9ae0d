"""Reads an experiment's file, and makes the recipe of each run from its layers.

The layers, from the lowest: the recipe, `common`, the scenario, the variant, and what the runner sets.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_fuse.errors import shortened
from megatron_fuse.experiments.experiment import Experiment, run_name, scenario_and_name
from megatron_fuse.recipe import Document, Keys, Recipe, checked, make_recipe, read_document, with_new_names
from megatron_fuse.recipe.yaml_files import shown


def load_experiment(path: Path) -> Experiment:
    """The experiment in a file.

    Raises UserError with the place of every error, also in the options of the variants.
    """
    document = read_document(path)
    experiment = _with_new_names(checked(Experiment, document.content, document.place), document)
    recipe = read_document(experiment.recipe)
    for scenario in experiment.scenarios or [None]:
        given = [] if scenario is None else [(document, ("scenarios", scenario))]
        for name in experiment.variants:
            layers = [(document, ("variants", name)), *given, (document, ("common",)), (recipe, ())]
            content = _variant(experiment, recipe, run_name(scenario, name), experiment.seeds[0])
            under = f" under scenarios.{scenario}" if scenario else ""
            make_recipe(content, _innermost(layers, f"{shortened(str(path), 200)}: variants.{name}{under}"))
    return experiment


def _with_new_names(experiment: Experiment, document: Document) -> Experiment:
    """The experiment with the new names of keys, so that layers of old and of new names fit on each other."""

    def options(content: dict[str, Any], *outer: str) -> dict[str, Any]:
        return with_new_names(content, lambda keys: document.place((*outer, *keys)))[0]

    variants = {name: options(content, "variants", name) for name, content in experiment.variants.items()}
    scenarios = {name: options(content, "scenarios", name) for name, content in experiment.scenarios.items()}
    changed = {"common": options(experiment.common, "common"), "variants": variants, "scenarios": scenarios}
    return experiment.model_copy(update=changed)


def _innermost(layers: Sequence[tuple[Document, Keys]], otherwise: str) -> Callable[[Keys], str]:
    """A function that gives the place of a key in the first layer that has the key.

    layers: a document, and the keys under which its options stand. otherwise: the place if no layer has the
    key.
    """

    def place(keys: Keys) -> str:
        for document, outer in layers:
            if keys and document.line_of((*outer, *keys)) is not None:
                return document.place((*outer, *keys))
        return f"{otherwise}: {shown(keys)}" if keys else otherwise

    return place


def data_directory(experiment: Experiment, run: str, seed: int) -> Path:
    """The directory of the data stages: runs of one scenario and seed share them."""
    scenario, _ = scenario_and_name(run)
    return experiment.workdir / "data" / run_name(scenario, f"seed-{seed}")


def run_directory(experiment: Experiment, run: str, seed: int) -> Path:
    """The directory of a variant or merge with a seed, or of the measurement of a model with a seed."""
    return experiment.workdir / "runs" / run / f"seed-{seed}"


def variant_recipe(experiment: Experiment, run: str, seed: int) -> Recipe:
    """The recipe of one run: that of the experiment, changed by the scenario and by the variant, with the
    run's directories.

    Raises UserError if the options are not valid.
    """
    path = experiment.recipe
    found = path.stat() if path.exists() else None
    recipe = _recipe_of_all(path, found and (found.st_mtime_ns, found.st_size))
    content = _variant(experiment, recipe, run, seed)
    return make_recipe(content, f"{experiment.recipe} with variant {run}")


@cache  # parsing YAML takes longer than the rest, and a map has a thousand runs
def _recipe_of_all(path: Path, version: tuple[int, int] | None) -> Document:
    """version: what differs after a change of the file: the time of the change, and the size."""
    return read_document(path)


def _variant(experiment: Experiment, recipe: Document, run: str, seed: int) -> dict[str, Any]:
    content, _ = with_new_names(recipe.content, recipe.place)
    directory = run_directory(experiment, run, seed)
    scenario, name = scenario_and_name(run)
    set_by_runner = {
        "workdir": str(data_directory(experiment, run, seed)),
        "seed": seed,
        "training": {
            "save": str(directory / "checkpoints"),
            "tensorboard_dir": str(directory / "tensorboard"),
        },
        "export": {"path": str(directory / "export")},
    }
    of_scenario = {} if scenario is None else experiment.scenarios[scenario]
    for options in (experiment.common, of_scenario, experiment.variants[name], set_by_runner):
        content = laid_over(content, options)
    return with_places(content, seed, scenario)


def with_places(value: Any, seed: int, scenario: str | None = None) -> Any:
    """The value with {seed} and {scenario} replaced in all its texts."""
    if isinstance(value, dict):
        return {key: with_places(item, seed, scenario) for key, item in value.items()}
    if isinstance(value, list):
        return [with_places(item, seed, scenario) for item in value]
    if not isinstance(value, str):
        return value
    return value.replace("{seed}", str(seed)).replace("{scenario}", scenario or "{scenario}")


def laid_over(content: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The content with the options laid over it: mappings key by key, other values replaced.

    A null removes an existing key, for example a source or a preset.
    """
    merged = dict(content)
    for key, value in options.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = laid_over(merged[key], value)
        else:
            merged[key] = value
    return merged
