"""The experiment file: variants of a recipe, seeds, the command that measures them, and tables of the report.

    recipe: examples/skills/recipe.yaml          # what all variants share
    workdir: examples/skills/build/experiments   # data of every seed, runs, logs
    results: docs/results/skills.csv             # one row per variant, seed and metric
    seeds: [1, 2, 3, 4, 5]
    evaluate: python measure.py --model {model} --output {output} --split {split} --seed {seed}
    metrics: {generation: generation, choice: choice}
    models: {alpha: examples/skills/build/sources/alpha}       # measured as they are
    variants:
      csft: {schedule: {preset: csft}}                         # laid over the recipe
    merges:
      slerp: {method: slerp, models: [csft, alpha]}            # of variants of the same seed and of models
    tables:
      main: {title: Fusion beside its alternatives, rows: [alpha, csft, slerp], baseline: csft}

Scenarios repeat the same variants on other data or other models:

    scenarios:
      clean: {}
      errors_30: {data: {path: examples/skills/build/errors_30.jsonl}}
    tables:
      clean: {title: Without errors, scenario: clean, rows: [csft, fuse], baseline: csft}
    maps:
      errors: {title: Errors, scenarios: [clean, errors_30], rows: [fuse, profuser], baseline: csft}

A run is then called SCENARIO/VARIANT.

Every seed has its own data stages, which its variants share. The options of a variant decide which stages run
again, usually only the selection and the training. Every scenario has data stages of its own. `{seed}` and
`{scenario}` may stand in prepare, models, the recipe and the options that change it. Then the seeds also
differ in what is named there, for example in their source models.
"""

import shlex
import string
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.values import Line, Location, Name, Options, Seed

PLACEHOLDERS = {"model", "output", "split", "seed", "scenario"}
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
    fields = [
        field
        for word in command_parts(text)
        for field in string.Formatter().parse(word)
        if field[1] is not None
    ]
    named = {name for _, name, _, _ in fields if name is not None}
    if not {"model", "output"} <= named <= PLACEHOLDERS or any(
        form or conversion for _, _, form, conversion in fields
    ):
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
    options: dict[Name, float | Line] = Field(
        default_factory=dict, description="other flags of `megatron-fuse merge`"
    )

    @property
    def parts(self) -> list[str]:
        """Names of all models and variants that the merge is made from, the base included."""
        return [*self.models, *([self.base] if self.base else [])]


class Table(Options):
    """Rows of one table of the report, in their order."""

    title: Line
    scenario: Name | None = Field(
        None, description="the scenario of all rows, if the experiment has scenarios"
    )
    rows: Annotated[list[Name], Field(min_length=1)]
    baseline: Name
    expected: list[Name] = Field(
        default_factory=list,
        description="rows whose difference was the question before the runs: they are compared as a family "
        "of their own",
    )
    x: dict[Name, float] = Field(
        default_factory=dict,
        description="one number per row; the table is then also drawn as a curve over these numbers",
    )
    x_label: str = ""
    note: str = Field("", description="what a reader has to know about the rows")

    @property
    def scenarios(self) -> list[Name | None]:
        """The only scenario, in the form that a map has."""
        return [self.scenario]


class Map(Options):
    """The same comparison under several scenarios: one row of the report per scenario, one column per
    row.
    """

    title: Line
    scenarios: Annotated[list[Name], Field(min_length=1)]
    rows: Annotated[list[Name], Field(min_length=1)]
    baseline: Name
    expected: list[Name] = Field(default_factory=list, description="as in a table")
    note: str = Field("", description="what a reader has to know of the map")


class Experiment(Options):
    recipe: Location = Field(description="recipe that every variant changes")
    common: dict[str, Any] = Field(
        default_factory=dict,
        description="options that change the recipe for all variants; null removes a key",
    )
    workdir: Location = Field(description="directory of this experiment only")
    results: Location = Field(
        description="CSV file of all results; the pictures of the report are written beside it"
    )
    seeds: Annotated[list[Seed], Field(min_length=1)]
    prepare: Command | None = Field(
        None,
        description="command that runs before everything else, for example to make models; it must keep "
        "what exists",
    )
    evaluate: MeasuringCommand = Field(
        description="command with {model}, {output}, {split}, {seed} and {scenario}; it writes {metric: "
        "{value, n}} as JSON"
    )
    split: Name = Field("test", description="value of {split} if --split is not given")
    metrics: Annotated[dict[Line, Line], Field(min_length=1)] = Field(
        description="metric -> its name in tables"
    )
    models: dict[Name, Location] = Field(
        default_factory=dict, description="Hugging Face directories that are measured without training"
    )
    variants: dict[Name, dict[str, Any]] = Field(
        description="name of the variant -> options that change the recipe"
    )
    scenarios: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="name of the scenario -> options that change the recipe before those of a variant; the "
        "data stages run once per scenario and seed",
    )
    merges: dict[Name, Merge] = Field(default_factory=dict)
    tables: dict[Name, Table] = Field(default_factory=dict)
    maps: dict[Name, Map] = Field(default_factory=dict)
    preface: str = Field(
        "", description="Markdown before the tables of the report; [[TABLE METRIC RUN]] quotes a cell"
    )

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [*self.models, *self.variants, *self.merges]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: the name is used twice in models, variants and merges. Use every name "
                "once."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds contains a seed twice: {self.seeds}. Remove one of the two.")
        if not self.tables and not self.maps:
            raise ValueError("there is no table. Add one under tables, or a map under maps.")
        if both := sorted(self.tables.keys() & self.maps.keys()):
            raise ValueError(
                f"{', '.join(both)}: the name is used in tables and in maps. Use every name once."
            )
        shown: dict[str, Table | Map] = {f"tables.{name}": table for name, table in self.tables.items()}
        shown |= {f"maps.{name}": each for name, each in self.maps.items()}
        for place, each in shown.items():
            x = {} if isinstance(each, Map) else each.x
            unknown = sorted({*each.rows, each.baseline, *x} - set(names))
            if unknown:
                raise ValueError(
                    f"{place}: {', '.join(unknown)} is not the name of a variant, model or merge. "
                    f"Choose from {', '.join(names)}."
                )
            if beside := sorted(set(each.expected) - set(each.rows)):
                raise ValueError(
                    f"{place}.expected: {', '.join(beside)} is not a row. Add it to rows, or remove it."
                )
            for scenario in each.scenarios:
                if scenario is None and self.scenarios:
                    raise ValueError(f"{place}: set scenario to one of {', '.join(self.scenarios)}.")
                if scenario is not None and scenario not in self.scenarios:
                    known = ", ".join(self.scenarios) or "none, because the key scenarios is missing"
                    raise ValueError(
                        f"{place}: {scenario} is not the name of a scenario. There are: {known}."
                    )
        for name, merge in self.merges.items():
            unknown = sorted(set(merge.parts) - {*self.models, *self.variants})
            if unknown:
                raise ValueError(f"merges.{name}: {', '.join(unknown)} is not the name of a variant or model")
        return self

    @model_validator(mode="after")
    def _has_scenarios_to_name(self) -> Self:
        if not self.scenarios and "{scenario}" in f"{self.evaluate} {self.prepare}":
            raise ValueError(
                "evaluate or prepare has {scenario}, but there are no scenarios. Remove it, or add scenarios."
            )
        return self

    @model_validator(mode="after")
    def _leaves_places_to_the_runner(self) -> Self:
        of_variants = {f"variants.{name}": options for name, options in self.variants.items()}
        of_scenarios = {f"scenarios.{name}": options for name, options in self.scenarios.items()}
        given_options = {"common": self.common} | of_scenarios | of_variants
        for place, options in given_options.items():
            sections = {section: value for section, value in options.items() if isinstance(value, dict)}
            given = {*options, *(f"{section}.{key}" for section, value in sections.items() for key in value)}
            if reserved := sorted(given & _OURS):
                raise ValueError(
                    f"{place} sets {', '.join(reserved)}, but the runner sets this for every run. Remove it."
                )
        return self

    @property
    def run_names(self) -> list[str]:
        """The names of all runs that can be made: SCENARIO/NAME, or NAME without scenarios."""
        names = [*self.models, *self.variants, *self.merges]
        return [run_name(scenario, name) for scenario in self.scenarios or [None] for name in names]

    def needed(self, tables: list[str]) -> list[str]:
        """The runs that these tables and maps show, and the parts of their merges, in the order of
        run_names.
        """
        shown = set[str]()
        for table in tables:
            each = self.tables.get(table) or self.maps[table]
            names = {*each.rows, each.baseline}
            names |= {part for name in names & set(self.merges) for part in self.merges[name].parts}
            shown |= {run_name(scenario, name) for scenario in each.scenarios for name in names}
        return [name for name in self.run_names if name in shown]


def run_name(scenario: str | None, name: str) -> str:
    """The name of a run: of a variant, model or merge under a scenario."""
    return name if scenario is None else f"{scenario}/{name}"


def scenario_and_name(run: str) -> tuple[str | None, str]:
    """The parts of a run's name."""
    scenario, _, name = run.rpartition("/")
    return scenario or None, name


def require_tables(experiment: Experiment, names: list[str]) -> list[str]:
    """The names as given, or the name of the first table if none is given.

    Raises UserError for an unknown table.
    """
    known = [*experiment.tables, *experiment.maps]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(
            f"{', '.join(unknown)} is not a table of this experiment. Choose from {', '.join(known)}."
        )
    return names or known[:1]
