"""From a YAML file and command-line flags to a checked Recipe, with errors that name the key.

Flags: the keys of `parallel` and `training` bear Megatron-LM's bare names (`training.global_batch_size` is
`--global-batch-size`), those of every other section are prefixed by it (`data.path` is `--data-path`).
"""

import argparse
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from yaml.constructor import ConstructorError

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.options import Recipe

Checked = TypeVar("Checked", bound=BaseModel)

BARE_SECTIONS = ("parallel", "training")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _scalar_type(annotation: Any) -> type | tuple | None:
    """The type of a value that fits into one flag (a tuple for a choice of words), None for lists and mappings."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _scalar_type(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        return _scalar_type(inner[0]) if len(inner) == 1 else None
    if origin is Literal:
        return typing.get_args(annotation)
    return annotation if annotation in (int, float, str, bool, Path) else None


def _flags() -> Iterator[tuple[str, tuple[str, ...], FieldInfo]]:
    """(flag, key path, field) of every option that a flag can set."""
    for name, field in Recipe.model_fields.items():
        section = _section(field)
        if section is None:
            if _scalar_type(field.annotation):
                yield f"--{name}", (name,), field
            continue
        prefix = "" if name in BARE_SECTIONS else f"{name}-"
        for key, inner in section.model_fields.items():
            if _scalar_type(inner.annotation):
                yield "--" + (prefix + key).replace("_", "-"), (name, key), inner


def add_recipe_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --recipe, --print-recipe and one flag for every scalar option."""
    parser.add_argument("--recipe", type=Path, required=required, help="YAML file that describes the run")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and exit")
    group = parser.add_argument_group("overrides of the recipe")
    for flag, path, field in _flags():
        kind = _scalar_type(field.annotation)
        description = (field.description or "").replace("%", "%%")
        keywords: dict[str, Any] = {"dest": ".".join(path), "default": argparse.SUPPRESS, "help": description}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["metavar"] = "|".join(kind) if isinstance(kind, tuple) else path[-1].upper()
        group.add_argument(flag, **keywords)


class _Loader(yaml.SafeLoader):
    """YAML whose mappings have no key twice: the second would replace the first, a whole source say, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping. Raises UserError where it is not YAML, not a mapping, or has a key twice."""
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{path}: wanted is a mapping of keys, this file {found}")
    return content


def _explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if part != "[key]") or "the whole"
        problem = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            problem = f"unknown key; allowed here: {', '.join(_allowed(model, item['loc'][:-1]))}"
        elif item["type"] in ("model_type", "dict_type"):
            problem = f"must be a mapping of keys (given: {item['input']!r})"
        elif item["type"] == "missing":
            problem = "required, but not given"
        elif not isinstance(item.get("input"), dict):
            problem += f" (given: {item.get('input')!r})"
        lines.append(f"{where}: {key}: {problem}")
    return "\n       ".join(lines)


def _allowed(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Keys that the mapping at this place may have."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            annotation = next(f.annotation for n, f in model.model_fields.items() if part in (n, f.alias))
        else:  # a key or an index: the element's type comes last in dict[Name, X] and list[X]
            annotation = typing.get_args(model)[-1]
        inner = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        is_optional = typing.get_origin(annotation) in (Union, types.UnionType)
        model = inner[0] if is_optional and len(inner) == 1 else annotation
    return [field.alias or name for name, field in model.model_fields.items()]


def checked(model: type[Checked], content: dict[str, Any], where: str) -> Checked:
    """The options that a mapping read from YAML holds. Raises UserError with the path of every wrong key and the allowed values."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(_explain(error, where, model)) from error


def make_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """As `checked`."""
    return checked(Recipe, content, where)


def recipe_from_arguments(arguments: argparse.Namespace) -> Recipe:
    """The recipe file with the given flags laid over it; prints it and exits where --print-recipe is given."""
    content = read_yaml(arguments.recipe)
    for flag, path, _ in _flags():
        value = getattr(arguments, ".".join(path), None)
        if value is None:
            continue
        mapping = content
        for key in path[:-1]:
            mapping = mapping.setdefault(key, {})
            if not isinstance(mapping, dict):
                raise UserError(f"{arguments.recipe}: {key}: must be a mapping for {flag} to set a key in it")
        mapping[path[-1]] = value
        if path == ("schedule", "preset"):
            content["schedule"].pop("phases", None)
    recipe = make_recipe(content, str(arguments.recipe))
    if arguments.print_recipe:
        print(dump_recipe(recipe), end="")
        raise SystemExit(0)
    return recipe


def load_recipe(description: str | None = None, argv: Sequence[str] | None = None) -> Recipe:
    """The recipe of a command that has no options of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    return recipe_from_arguments(parser.parse_args(argv))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; loading it gives the same recipe."""
    content = recipe.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
