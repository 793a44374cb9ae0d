"""Reads a YAML file and command-line flags into a checked Recipe.

Flags for the keys of `parallel` and `training` have Megatron-LM's bare names (`training.global_batch_size` is
`--global-batch-size`). Flags of every other section have the section as prefix (`data.path` is
`--data-path`). If the recipe itself has a key of the same name, the flag of the section always has the
prefix: `seed` is `--seed`, `training.seed` is `--training-seed`.
"""

import argparse
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.checking import make_recipe
from megatron_fuse.recipe.options import Recipe
from megatron_fuse.recipe.renamed import RENAMED, given_twice, warn_of_old_name, with_new_names
from megatron_fuse.recipe.values import limits, path_argument
from megatron_fuse.recipe.yaml_files import Keys, dump_yaml, plain_value, read_document

BARE_SECTIONS = ("parallel", "training")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _scalar_type(annotation: Any) -> type | tuple | None:
    """The type of a value that one flag can give (a tuple for a choice), None for lists and mappings."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _scalar_type(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        return _scalar_type(inner[0]) if len(inner) == 1 else None
    if origin is Literal:
        return typing.get_args(annotation)
    return annotation if annotation in (int, float, str, bool, Path) else None


def _element_type(annotation: Any) -> type | tuple | None:
    """The type of the elements of a list that one flag can give, None for any other annotation."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        return _element_type(inner[0]) if len(inner) == 1 else None
    return _scalar_type(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is list else None


def _metadata(field: FieldInfo) -> list[Any]:
    """The limits of a field's value. If the field may be null, these are the limits of the other values."""
    inner = [
        part for part in typing.get_args(field.annotation) if typing.get_origin(part) is typing.Annotated
    ]
    nested = FieldInfo.from_annotation(inner[0]).metadata if len(inner) == 1 else []
    return [*field.metadata, *nested]


def _flags() -> Iterator[tuple[str, tuple[str, ...], FieldInfo]]:
    """(flag, key path, field) of every option that a flag can set, lists included.

    The flag of an old name follows that of the new one, with the old path and the field of the new one.
    """
    old_names = {new: old for old, new in RENAMED.items()}
    for name, field in Recipe.model_fields.items():
        section = _section(field)
        if section is None:
            if _scalar_type(field.annotation):
                yield f"--{name}", (name,), field
            continue
        for key, inner in section.model_fields.items():
            if _scalar_type(inner.annotation) or _element_type(inner.annotation):
                yield _flag(name, key), (name, key), inner
                if old := old_names.get((name, key)):
                    yield _flag(*old), old, inner


def _flag(section: str, key: str) -> str:
    prefix = "" if section in BARE_SECTIONS and key not in Recipe.model_fields else f"{section}-"
    return "--" + (prefix + key).replace("_", "-")


def add_recipe_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --recipe, --print-recipe and one flag for every option that is a single value or a list of
    them.
    """
    parser.add_argument(
        "--recipe", type=path_argument, required=required, help="YAML file that describes the run"
    )
    parser.add_argument(
        "--print-recipe", action="store_true", help="print the recipe with all defaults and exit"
    )
    group = parser.add_argument_group("options that override keys of the recipe")
    for flag, path, field in _flags():
        kind = _scalar_type(field.annotation)
        description = "; ".join(filter(None, (field.description, limits(_metadata(field))))).replace(
            "%", "%%"
        )
        if path in RENAMED:
            description = f"deprecated: use {_flag(*RENAMED[path])}"
        keywords: dict[str, Any] = {"dest": ".".join(path), "default": argparse.SUPPRESS, "help": description}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif kind is None:
            keywords |= {"nargs": "+", "metavar": path[-1].upper()}
        else:
            keywords["metavar"] = "|".join(kind) if isinstance(kind, tuple) else path[-1].upper()
        group.add_argument(flag, **keywords)


def read_recipe(path: Path) -> Recipe:
    """A recipe file, without overrides. Raises UserError with the line and key of every error."""
    document = read_document(path)
    return make_recipe(document.content, document.place)


def recipe_from_arguments(arguments: argparse.Namespace) -> Recipe:
    """The recipe file with the values of the given flags in the place of its own.

    If --print-recipe is given, prints the recipe and raises SystemExit(0). Raises UserError with the flag, or
    the line and key, of every error.
    """
    document = read_document(arguments.recipe)
    content, place_in_file = with_new_names(document.content, document.place)
    flags: dict[Keys, str] = {}
    for flag, path, field in _flags():
        if not hasattr(arguments, ".".join(path)):
            continue
        value = _value(flag, getattr(arguments, ".".join(path)), field)
        if path in RENAMED:
            path = RENAMED[path]
            if path in flags:
                raise UserError(given_twice(flag, flags[path], flag))
            warn_of_old_name(flag, _flag(*path))
        mapping = content
        for key in path[:-1]:
            mapping = mapping.setdefault(key, {})
            if not isinstance(mapping, dict):
                raise UserError(
                    f"{document.place((key,))}: must be a mapping, because {flag} sets a key in it"
                )
        mapping[path[-1]] = value
        flags[path] = flag
        if path == ("schedule", "preset"):
            content["schedule"].pop("phases", None)

    def place(keys: Keys) -> str:
        # An element of a list belongs to the list's flag.
        outer = (keys[:length] for length in range(len(keys), 0, -1))
        flag = next((flags[key] for key in outer if key in flags), None)
        return f"{flag}: {'.'.join(map(str, keys))}" if flag else place_in_file(keys)

    recipe = make_recipe(content, place)
    if arguments.print_recipe:
        print(dump_recipe(recipe), end="")
        raise SystemExit(0)
    return recipe


def _value(flag: str, given: Any, field: FieldInfo) -> Any:
    """The value given for a flag, read by the same rules as a value in the file. Raises UserError."""
    kind = _scalar_type(field.annotation) or _element_type(field.annotation)
    if kind not in (int, float):
        return given
    try:
        return [plain_value(value) for value in given] if isinstance(given, list) else plain_value(given)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def load_recipe(description: str | None = None, argv: Sequence[str] | None = None) -> Recipe:
    """The recipe of a command that has no other options.

    Raises UserError and SystemExit as recipe_from_arguments.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    return recipe_from_arguments(parser.parse_args(argv))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out. Loading this text gives the same recipe."""
    content = recipe.model_dump(mode="json", by_alias=True)
    return dump_yaml(content)
