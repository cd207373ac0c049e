"""Dotted paths into a recipe: which fields there are at each place, and which one a misspelt name may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from llavar_peft.recipe.schema import Full, Lora, Projector, Recipe

Path = tuple[str | int, ...]
"""``("stages", 0, "epochs")`` for ``stages.0.epochs``."""

TUNES: dict[str, type] = {"projector": Projector, "full": Full, "lora": Lora}
"""What ``tune`` may be, by the ``type`` each class carries."""


def dotted(path: Path) -> str:
    """Spell a path as it is written in overrides and messages."""
    return ".".join(map(str, path)) or "recipe"


@cache
def fields_of(cls: type) -> dict[str, Any]:
    """Return a configuration class's fields with their resolved types."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type without None; a type that is no union is its own alternative."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(member for member in typing.get_args(hint) if member is not types.NoneType)
    return (hint,)


def optional(hint: Any) -> bool:
    """Whether a field of this type may be left empty."""
    return types.NoneType in typing.get_args(hint)


def class_for(hint: Any, node: object) -> type | None:
    """Return the configuration class that a node of this type is read as.

    Args:
        hint: The declared type of the place.
        node: The mapping that stands there; its ``type`` chooses between ``tune``'s classes.

    Returns:
        The class, or None where the place holds no fields.
    """
    classes = [member for member in members(hint) if dataclasses.is_dataclass(member)]
    if len(classes) > 1:
        chosen = TUNES.get(str(node.get("type"))) if isinstance(node, Mapping) else None
        return chosen if chosen in classes else None
    return typing.cast("type | None", classes[0] if classes else None)


def step(hint: Any, key: str | int, node: object) -> Any:
    """Return the type one key further down, or None where the key leads nowhere.

    Args:
        hint: The type of the place.
        key: A field's name, or an index into a list.
        node: What stands at the place.

    Returns:
        The declared type below.
    """
    if isinstance(key, int):
        tuples = [member for member in members(hint) if typing.get_origin(member) is tuple]
        return typing.get_args(tuples[0])[0] if tuples else None
    cls = class_for(hint, node)
    return fields_of(cls).get(key) if cls else None


def look_up(mapping: object, path: Path) -> object:
    """Return what stands at a path, or None where nothing does."""
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
    """Return the declared type at a path of a recipe, or None where the path leads nowhere.

    Args:
        mapping: The recipe as plain data; it says which class stands at ``tune``.
        path: The place asked for.

    Returns:
        The declared type.
    """
    hint: Any = Recipe
    for depth, key in enumerate(path):
        hint = step(hint, key, look_up(mapping, path[:depth]))
        if hint is None:
            return None
    return hint


@cache
def _homes() -> dict[str, str]:
    """Where each field of a recipe lives, for names that are right but stand at the wrong place."""
    homes: dict[str, str] = {}

    def visit(cls: type, prefix: str) -> None:
        for name, hint in fields_of(cls).items():
            homes.setdefault(name, prefix + name)
            for member in members(hint):
                element = typing.get_args(member)[0] if typing.get_origin(member) is tuple else member
                if dataclasses.is_dataclass(element):
                    visit(typing.cast(type, element), f"{prefix}{name}." + ("N." if element is not member else ""))

    visit(Recipe, "")
    return homes


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that ``name`` was probably meant to be, or None."""
    found = difflib.get_close_matches(name.casefold(), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def advice(path: Path, names: Iterable[str]) -> str:
    """Say what to write instead of a field that is not known at its place.

    Args:
        path: The unknown field.
        names: The fields that are known there.

    Returns:
        A fix: the near name, else the place where this name belongs, else all names of this place.
    """
    name, known = str(path[-1]), list(names)
    near = nearest(name, known)
    if near is not None:
        return f"did you mean '{near}'?"
    home = _homes().get(name)
    if home == dotted(tuple("N" if isinstance(key, int) else key for key in path)):
        owners = [kind for kind, cls in TUNES.items() if name in fields_of(cls)]
        return f"only tune: {' or '.join(owners)} has it"
    return f"it belongs at {home}" if home else f"the fields here are {', '.join(known)}"
