"""The fields of the schema by dotted path: their types, and suggestions for names that are not fields."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from llavar_peft.recipe.resolution import CrossAttention, Tiles
from llavar_peft.recipe.schema import Full, Lora, Projector, Recipe

Path = tuple[str | int, ...]
"""``("stages", 0, "epochs")`` for ``stages.0.epochs``."""

TUNES: dict[str, type] = {"projector": Projector, "full": Full, "lora": Lora}
"""The classes of ``tune`` by their ``type``."""
RESOLUTIONS: dict[str, type] = {"tiles": Tiles, "cross_attention": CrossAttention}
"""The classes of ``model.resolution`` by their ``type``."""


@cache
def recipe_adapter() -> TypeAdapter[Recipe]:
    """Return pydantic's validator of recipes."""
    return TypeAdapter(Recipe)


def dotted(path: Path) -> str:
    """Format a path as in overrides and messages."""
    return ".".join(map(str, path)) or "recipe"


@cache
def fields_of(cls: type) -> dict[str, Any]:
    """Return the fields of a configuration class with their types, without constraints."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type without None; a type that is not a union is its only alternative."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(member for member in typing.get_args(hint) if member is not types.NoneType)
    return (hint,)


def is_optional(hint: Any) -> bool:
    """Return whether a field of this type may be None."""
    return types.NoneType in typing.get_args(hint)


def list_element(hint: Any) -> Any:
    """Return the element type of the list that a field of this type may hold, or None if it holds no list."""
    lists = _list_type(hint)
    return typing.get_args(lists)[0] if lists is not None else None


def _list_type(hint: Any) -> Any:
    return next((member for member in members(hint) if typing.get_origin(member) is tuple), None)


def kinds_of(hint: Any) -> dict[str, type]:
    """Return the classes of a union by their ``type``; empty for any other type."""
    unions = (kinds for kinds in (TUNES, RESOLUTIONS) if members(hint) == tuple(kinds.values()))
    return next(unions, {})


def class_for(hint: Any, node: object) -> type | None:
    """Return the configuration class of a value, or None if the value has no fields.

    Args:
        hint: The value's declared type.
        node: The value as plain data; its ``type`` selects between the classes of a union.
    """
    classes = [member for member in members(hint) if dataclasses.is_dataclass(member)]
    if len(classes) > 1:
        return kinds_of(hint).get(str(node.get("type"))) if isinstance(node, Mapping) else None
    return typing.cast("type | None", classes[0] if classes else None)


def step(hint: Any, key: str | int, node: object) -> Any:
    """Return the declared type of one key of a value, or None if there is no such key.

    Args:
        hint: The value's declared type.
        key: A field's name, or an index into a list.
        node: The value as plain data.
    """
    if isinstance(key, int):
        return list_element(hint)
    cls = class_for(hint, node)
    return fields_of(cls).get(key) if cls else None


def look_up(mapping: object, path: Path) -> object:
    """Return the value at a path, or None if there is none."""
    node = mapping
    for key in path:
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and -len(node) <= key < len(node):
            node = node[key]
        else:
            return None
    return node


def type_at(mapping: object, path: Path) -> Any:
    """Return the declared type at a path of a recipe in plain data, or None if the path does not exist."""
    hint: Any = Recipe
    for depth, key in enumerate(path):
        hint = step(hint, key, look_up(mapping, path[:depth]))
        if hint is None:
            return None
    return hint


def path_of(loc: tuple[str | int, ...]) -> Path:
    """Convert the location of a pydantic error to a path, by removing the tags of unions."""
    path: Path = ()
    hint: Any = Recipe
    for part in loc:
        if len(members(hint)) > 1:
            # The tag selects one alternative of the union, in which the rest of the location continues.
            hint = kinds_of(hint).get(str(part)) or _list_type(hint)
            continue
        path = (*path, part)
        hint = step(hint, part, None)
    return path


@cache
def json_schema_of(cls: type, name: str) -> dict[str, Any]:
    """Return the JSON schema of a field, without its alternative null."""
    whole = recipe_adapter().json_schema()
    schema = (whole if cls is Recipe else whole["$defs"][cls.__name__])["properties"][name]
    return dict(schema.get("anyOf", [schema])[0])


def bounds_of(cls: type, name: str) -> str:
    """Describe the numbers that a field accepts, for example ``from 0 to 1``; empty if it is unbounded."""
    schema = json_schema_of(cls, name)
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    # All bounds are whole; some versions of pydantic return them as floats.
    low, high, above, below = (int(schema[key]) if key in schema else None for key in keys)
    if low is not None and (high is not None or below is not None):
        return f"from {low} to {high}" if below is None else f"from {low} to below {below}"
    if above is not None:
        return f"above {above}"
    return f"of {low} or more" if low is not None else ""


@cache
def _first_paths() -> dict[str, str]:
    """Return the first path of each field name, for names that are valid elsewhere in the recipe."""
    paths: dict[str, str] = {}

    def visit(cls: type, prefix: str) -> None:
        for name, hint in fields_of(cls).items():
            paths.setdefault(name, prefix + name)
            for member in members(hint):
                element = list_element(member) or member
                if dataclasses.is_dataclass(element):
                    visit(typing.cast(type, element), f"{prefix}{name}." + ("N." if element is not member else ""))

    visit(Recipe, "")
    return paths


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of ``names``, or None if none is similar."""
    found = difflib.get_close_matches(name.casefold(), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def suggest_field(path: Path, names: Iterable[str]) -> str:
    """Return the fix for an unknown field: a similar name, else the place of this name, else all names.

    Args:
        path: The unknown field.
        names: The fields that exist at its place.
    """
    name, known = str(path[-1]), list(names)
    parent = str(path[-2]) if len(path) > 1 else ""
    kinds: Mapping[str, type] = {"tune": TUNES, "resolution": RESOLUTIONS}.get(parent, {})
    elsewhere = [field for cls in kinds.values() for field in fields_of(cls)]
    near = None if name in elsewhere else nearest(name, known)
    if near is not None:
        return f"did you mean '{near}'?"
    other = nearest(name, elsewhere)
    if other is not None:
        owners = [kind for kind, cls in kinds.items() if other in fields_of(cls)]
        return f"only {parent}: {' or '.join(owners)} has {'it' if other == name else other}"
    place = _first_paths().get(name)
    return f"it belongs at {place}" if place else f"the fields here are {', '.join(known)}"
