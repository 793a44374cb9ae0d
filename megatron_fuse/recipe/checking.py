"""Turns the content of a file into checked options. Errors name the place of every wrong key."""

import difflib
import types
import typing
from typing import Any, TypeVar, Union

from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_fuse.errors import UserError, shortened
from megatron_fuse.recipe.options import Recipe
from megatron_fuse.recipe.renamed import with_new_names
from megatron_fuse.recipe.yaml_files import Keys, Place, shown

Checked = TypeVar("Checked", bound=BaseModel)

_MESSAGE, _LISTED = 560, 300  # characters


def checked(model: type[Checked], content: dict[str, Any], where: str | Place) -> Checked:
    """The options in a mapping read from YAML.

    where: what errors call a key, or the name of the file. Raises UserError with every wrong key, its value
    and the allowed values.
    """
    place = _place(where)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(_explain(error, place, model)) from error


def _place(where: str | Place) -> Place:
    return where if callable(where) else lambda keys: f"{where}: {shown(keys)}" if keys else where


def checked_value(kind: Any, value: Any, where: str) -> Any:
    """A value checked as one of the types of values.py, for an argument with the rules of a key in a file.

    where: what the error calls the argument. Raises UserError if the value is not valid.
    """
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problem = shortened(error.errors()[0]["msg"].removeprefix("Value error, "), _LISTED)
        raise UserError(f"{where}: {problem} (given: {_shown(value)})") from error


def make_recipe(content: dict[str, Any], where: str | Place = "recipe") -> Recipe:
    """`checked` for a Recipe. Keys may have their old names. Raises UserError as `checked` does."""
    return checked(Recipe, *with_new_names(content, _place(where)))


def _explain(error: ValidationError, place: Place, model: type[BaseModel]) -> str:
    """One line per wrong key, up to the length of a message. Missing keys come last."""
    message, count = "", error.error_count()
    items = sorted(error.errors(include_url=False), key=lambda item: item["type"] == "missing")
    for number, item in enumerate(items):
        line = f"{place(_keys(item['loc']))}: {_problem(item, model)}"
        if number and len(message) + len(line) > _MESSAGE:
            return f"{message}\n       and {count - number} more"
        message += ("\n       " if number else "") + shortened(line, _MESSAGE)
    return message


def _keys(location: Keys) -> Keys:
    """A location without the marks of pydantic, which stand in brackets: [key], [number], [ramp]."""
    return tuple(part for part in location if not (isinstance(part, str) and part.startswith("[")))


def _problem(item: Any, model: type[BaseModel]) -> str:
    given = item.get("input")
    match item["type"]:
        case "extra_forbidden":
            allowed = _allowed(model, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), allowed, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            return f"unknown key; allowed here: {shortened(', '.join(allowed), _LISTED)}{meant}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"must be a mapping of keys (given: {_shown(given)})"
        case "missing":
            return "the key is required, but missing"
        case "greater_than_equal":  # pydantic would write 1e-12 with all its zeros
            item["msg"] = f"Input should be greater than or equal to {item['ctx']['ge']}"
    problem = shortened(item["msg"].removeprefix("Value error, "), _LISTED)
    return problem if isinstance(given, dict) else f"{problem} (given: {_shown(given)})"


def _shown(value: Any) -> str:
    try:
        return shortened(repr(value), 80)
    except ValueError:  # an integer with more digits than Python converts to text
        return f"a {type(value).__name__}"


def _allowed(model: Any, location: Keys) -> list[str]:
    """The keys that the mapping at this location may have."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            annotation = next(f.annotation for n, f in model.model_fields.items() if part in (n, f.alias))
        # A key, an index or a tag: the element's type comes last in dict[Name, X], list[X] and number | Ramp.
        else:
            annotation = typing.get_args(model)[-1]
        model = _unwrapped(annotation)
    return [field.alias or name for name, field in model.model_fields.items()]


def _unwrapped(annotation: Any) -> Any:
    """The type of an annotation, without pydantic's metadata and without None."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _unwrapped(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        return _unwrapped(inner[0]) if len(inner) == 1 else annotation
    return annotation
