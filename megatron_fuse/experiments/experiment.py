"""The experiment file: variants of a recipe, seeds, the command that measures them, and tables of the report.

    recipe: examples/skills/recipe.yaml          # what all variants share
    workdir: examples/skills/build/experiments   # data of every seed, runs, logs
    results: docs/results/skills.csv             # one row per variant, seed and metric
    seeds: [1, 2, 3, 4, 5]
    evaluate: python examples/skills/measure.py --model {model} --output {output} --split {split} --seed {seed}
    metrics: {generation: generation, choice: choice}
    models: {alpha: examples/skills/build/sources/alpha}       # measured as they are
    variants:
      csft: {schedule: {preset: csft}}                         # laid over the recipe
    merges:
      slerp: {method: slerp, models: [csft, alpha]}            # of variants of the same seed and of models
    tables:
      main: {title: Fusion beside its alternatives, rows: [alpha, csft, slerp], baseline: csft}

Every seed has its own data stages, which its variants share. The options of a variant decide which stages run
again, usually only the selection and the training. `{seed}` may stand in prepare, models, the recipe and the
options laid over it. Then the seeds also differ in what is named there, for example in their source models.
"""

import shlex
import string
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_fuse.errors import UserError, shortened
from megatron_fuse.recipe import Document, Keys, Recipe, checked, make_recipe, read_document, with_new_names
from megatron_fuse.recipe.values import Line, Location, Name, Options, Seed
from megatron_fuse.recipe.yaml_files import shown

PLACEHOLDERS = {"model", "output", "split", "seed"}
# Keys that the runner itself sets for every run.
_OURS = {"workdir", "seed", "training.save", "training.load", "training.tensorboard_dir", "export.path"}


def command_parts(text: str) -> list[str]:
    """The words of a command line.

    Raises ValueError if there is no word, if quotes do not close, or for a NUL.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"not a command line: {error}") from error
    if not words or not words[0]:
        raise ValueError("must not be empty: write a command, or remove the key")
    if "\0" in text:
        raise ValueError("holds the character NUL, which a command line cannot contain")
    return words


def _command(text: str) -> str:
    command_parts(text)
    return text


def _measuring_command(text: str) -> str:
    """Checks that a command has the placeholders {model} and {output}, and no others than PLACEHOLDERS."""
    fields = [field for word in command_parts(text) for field in string.Formatter().parse(word) if field[1] is not None]
    named = {name for _, name, _, _ in fields if name is not None}
    if not {"model", "output"} <= named <= PLACEHOLDERS or any(form or conversion for _, _, form, conversion in fields):
        raise ValueError(
            f"the placeholders are {sorted(named)}, but {{model}} and {{output}} are needed and only "
            f"{sorted(PLACEHOLDERS)} are allowed, without a format: write a literal brace twice"
        )
    return text


Command = Annotated[str, AfterValidator(_command)]
MeasuringCommand = Annotated[str, AfterValidator(_measuring_command)]


class Merge(Options):
    """A merge of models of one architecture, by `megatron-fuse merge`."""

    method: Literal["linear", "slerp", "ties", "dare_ties", "dare_linear"]
    models: Annotated[list[Name], Field(min_length=2)] = Field(
        description="two or more variants or models; variants are merged per seed"
    )
    base: Name | None = Field(
        None, description="model or variant that the merge methods with a base take the differences from"
    )
    options: dict[Name, float | Line] = Field(default_factory=dict, description="other flags of `megatron-fuse merge`")

    @property
    def parts(self) -> list[str]:
        """Names of all models and variants that the merge is made from, the base included."""
        return [*self.models, *([self.base] if self.base else [])]


class Table(Options):
    """Rows of one table of the report, in their order."""

    title: Line
    rows: Annotated[list[Name], Field(min_length=1)]
    baseline: Name
    x: dict[Name, float] = Field(
        default_factory=dict,
        description="one number per row; the table is then also drawn as a curve over these numbers",
    )
    x_label: str = ""
    note: str = Field("", description="what a reader has to know about the rows")


class Experiment(Options):
    recipe: Location = Field(description="recipe that every variant changes")
    common: dict[str, Any] = Field(
        default_factory=dict, description="options that change the recipe for all variants; null removes a key"
    )
    workdir: Location = Field(description="directory of this experiment only")
    results: Location = Field(description="CSV file of all results; the pictures of the report are written beside it")
    seeds: Annotated[list[Seed], Field(min_length=1)]
    prepare: Command | None = Field(
        None,
        description="command that runs before everything else, for example to make models; it must keep what exists",
    )
    evaluate: MeasuringCommand = Field(
        description="command with {model}, {output}, {split} and {seed}; it writes {metric: {value, n}} as JSON"
    )
    split: Name = Field("test", description="value of {split} if --split is not given")
    metrics: Annotated[dict[Line, Line], Field(min_length=1)] = Field(description="metric -> its name in tables")
    models: dict[Name, Location] = Field(
        default_factory=dict, description="Hugging Face directories that are measured without training"
    )
    variants: dict[Name, dict[str, Any]] = Field(description="name of the variant -> options that change the recipe")
    merges: dict[Name, Merge] = Field(default_factory=dict)
    tables: Annotated[dict[Name, Table], Field(min_length=1)]
    preface: str = Field("", description="Markdown before the tables of the report")

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [*self.models, *self.variants, *self.merges]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: the name is used twice in models, variants and merges. Use every name once."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds contains a seed twice: {self.seeds}. Remove one of the two.")
        for name, table in self.tables.items():
            unknown = sorted({*table.rows, table.baseline, *table.x} - set(names))
            if unknown:
                raise ValueError(
                    f"tables.{name}: {', '.join(unknown)} is not the name of a variant, model or merge. "
                    f"Choose from {', '.join(names)}."
                )
        for name, merge in self.merges.items():
            unknown = sorted(set(merge.parts) - {*self.models, *self.variants})
            if unknown:
                raise ValueError(f"merges.{name}: {', '.join(unknown)} is not the name of a variant or model")
        return self

    @model_validator(mode="after")
    def _leaves_places_to_the_runner(self) -> Self:
        of_variants = {f"variants.{name}": options for name, options in self.variants.items()}
        given_options = {"common": self.common} | of_variants
        for place, options in given_options.items():
            sections = {section: value for section, value in options.items() if isinstance(value, dict)}
            given = {*options, *(f"{section}.{key}" for section, value in sections.items() for key in value)}
            if reserved := sorted(given & _OURS):
                raise ValueError(
                    f"{place} sets {', '.join(reserved)}, but the runner sets this for every run. Remove it."
                )
        return self

    def needed(self, tables: list[str]) -> list[str]:
        """Names of these tables' rows and of their merges' parts, in the order of models, variants, merges."""
        shown = {name for table in tables for name in (*self.tables[table].rows, self.tables[table].baseline)}
        for name in shown & set(self.merges):
            shown |= set(self.merges[name].parts)
        return [name for name in (*self.models, *self.variants, *self.merges) if name in shown]


def load_experiment(path: Path) -> Experiment:
    """The experiment in a file.

    Raises UserError with the place of every error, also in the options of the variants.
    """
    document = read_document(path)
    experiment = _with_new_names(checked(Experiment, document.content, document.place), document)
    recipe = read_document(experiment.recipe)
    for name in experiment.variants:
        layers = ((document, ("variants", name)), (document, ("common",)), (recipe, ()))
        content = _variant(experiment, recipe, name, experiment.seeds[0])
        make_recipe(content, _innermost(layers, f"{shortened(str(path), 200)}: variants.{name}"))
    return experiment


def _with_new_names(experiment: Experiment, document: Document) -> Experiment:
    """The experiment with the new names of keys, so that layers of old and of new names fit on each other."""

    def options(content: dict[str, Any], *outer: str) -> dict[str, Any]:
        return with_new_names(content, lambda keys: document.place((*outer, *keys)))[0]

    variants = {name: options(content, "variants", name) for name, content in experiment.variants.items()}
    return experiment.model_copy(update={"common": options(experiment.common, "common"), "variants": variants})


def _innermost(layers: tuple[tuple[Document, Keys], ...], otherwise: str) -> Callable[[Keys], str]:
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


def data_directory(experiment: Experiment, seed: int) -> Path:
    return experiment.workdir / "data" / f"seed-{seed}"


def run_directory(experiment: Experiment, name: str, seed: int) -> Path:
    """The directory of a variant or merge with a seed, or of the measurement of a model with a seed."""
    return experiment.workdir / "runs" / name / f"seed-{seed}"


def variant_recipe(experiment: Experiment, name: str, seed: int) -> Recipe:
    """The recipe of one run: that of the experiment with the variant's options, and directories for this run.

    Raises UserError if the options are not valid.
    """
    content = _variant(experiment, read_document(experiment.recipe), name, seed)
    return make_recipe(content, f"{experiment.recipe} with variant {name}")


def _variant(experiment: Experiment, recipe: Document, name: str, seed: int) -> dict[str, Any]:
    content, _ = with_new_names(recipe.content, recipe.place)
    run = run_directory(experiment, name, seed)
    set_by_runner = {
        "workdir": str(data_directory(experiment, seed)),
        "seed": seed,
        "training": {"save": str(run / "checkpoints"), "tensorboard_dir": str(run / "tensorboard")},
        "export": {"path": str(run / "export")},
    }
    for options in (experiment.common, experiment.variants[name], set_by_runner):
        content = laid_over(content, options)
    return with_seed(content, seed)


def with_seed(value: Any, seed: int) -> Any:
    """The value with {seed} replaced by the seed in all its texts."""
    if isinstance(value, dict):
        return {key: with_seed(item, seed) for key, item in value.items()}
    if isinstance(value, list):
        return [with_seed(item, seed) for item in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


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


def require_tables(experiment: Experiment, names: list[str]) -> list[str]:
    """The names as given, or the name of the first table if none is given.

    Raises UserError for an unknown table.
    """
    unknown = sorted(set(names) - set(experiment.tables))
    if unknown:
        raise UserError(
            f"{', '.join(unknown)} is not a table of this experiment. Choose from {', '.join(experiment.tables)}."
        )
    return names or [next(iter(experiment.tables))]
