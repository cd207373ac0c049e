"""Turns pydantic's findings into this package's words: one line for each fault, with its fix."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable
from typing import Any

from pydantic_core import ErrorDetails

from llavar_peft.recipe.field_paths import Path, class_for, look_up, members, nearest, optional, step
from llavar_peft.recipe.schema import Recipe

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_LONGEST_SHOWN = 60


def distinct_errors(errors: Iterable[ErrorDetails], plain: object) -> list[tuple[Path, ErrorDetails]]:
    """Keep one error for each place, where pydantic reports one for each alternative of a union.

    Args:
        errors: pydantic's findings.
        plain: What was validated.

    Returns:
        Each remaining error with its path; the unions' tags are taken out of it.
    """
    found = ((_untagged(error["loc"], plain), error) for error in errors)
    return [(path, error) for path, error in found if path is not None]


def number_in_text(error: ErrorDetails) -> float | None:
    """Return the number that YAML 1.1 reads as text (``2e-5`` without a point), or None for any other error."""
    text = error["input"]
    if error["type"] == "float_type" and isinstance(text, str) and _NUMBER.fullmatch(text.strip()):
        return float(text)
    return None


def format_value(value: object) -> str:
    """Return a value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def explain_error(error: ErrorDetails, hint: Any) -> tuple[str, str]:
    """Say what is wrong with a value, and how to fix it.

    Args:
        error: pydantic's finding about the value.
        hint: The declared type of its place.

    Returns:
        What is wrong, and the fix.
    """
    value, kind = error["input"], error["type"]
    got = f", got {format_value(value)}"
    if kind == "literal_error":
        return _explained_choice(value, hint)
    if kind.startswith("int"):
        return f"expected an integer{got}", _integer_mend(value)
    if kind.startswith("float"):
        return f"expected a number{got}", "write a number such as 0.5"
    if kind == "bool_type":
        return f"expected true or false{got}", "write one of the two, without quotes"
    if kind == "tuple_type":
        return f"expected a list{got}", f"write [{value}]" if isinstance(value, str) else "write [first, second]"
    if kind == "string_type":
        either = " or a list of strings" if len(members(hint)) > 1 else ""
        scalar = isinstance(value, bool | int | float)
        return f"expected a string{either}{got}", "put it in quotes" if scalar else "write a name"
    if kind == "dataclass_type":
        return f"expected a mapping of fields{got}", "write its fields below it, indented"
    return error["msg"][:1].lower() + error["msg"][1:] + got, "see the field's description in llavar_peft.recipe.schema"


def _explained_choice(value: object, hint: Any) -> tuple[str, str]:
    literals = [member for member in members(hint) if typing.get_origin(member) is typing.Literal]
    names = [choice for member in literals for choice in typing.get_args(member)]
    near = nearest(value, names) if isinstance(value, str) else None
    switch = bool in members(hint)
    choices = [True, False, *names] if switch else names
    listed = len(literals) + switch < len(members(hint))
    otherwise = ", or leave the field out" if optional(hint) else ""
    if listed and isinstance(value, str):
        otherwise = f", or write [{value}]"
    fix = f"did you mean '{near}'?" if near else f"choose one of them{otherwise}"
    return (
        f"expected one of {', '.join(map(format_value, choices))}{' or a list' * listed}, got {format_value(value)}",
        fix,
    )


def _integer_mend(value: object) -> str:
    if isinstance(value, float | str) and not isinstance(value, bool):
        text = str(value).strip()
        if _NUMBER.fullmatch(text) and abs(float(text)) < 1e15 and float(text).is_integer():
            return f"write {int(float(text))}"
    return "write a whole number such as 1"


def _untagged(loc: tuple[str | int, ...], plain: object) -> Path | None:
    """Return the path without unions' tags, or None for an error of an alternative that was not meant."""
    hint: Any = Recipe
    path: Path = ()
    for part in loc:
        node = look_up(plain, path)
        alternatives = members(hint)
        if len(alternatives) > 1:
            if part == "bool":
                return None  # the error of the names beside it says all
            cls = class_for(hint, node)
            if cls is None and isinstance(node, list) is not str(part).startswith("tuple"):
                return None
            if cls is not None and part != cls.__name__:
                return None
            hint = cls or _alternative(alternatives, str(part))
            continue
        hint = step(hint, part, node)
        path = (*path, part)
    return path


def _alternative(alternatives: tuple[Any, ...], tag: str) -> Any:
    expected = tuple if tag.startswith("tuple") else str
    for member in alternatives:
        if not dataclasses.is_dataclass(member) and (typing.get_origin(member) or member) is expected:
            return member
    return None
