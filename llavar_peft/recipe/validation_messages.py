"""The messages for values that do not fit the schema: what was expected, what was found, and the fix."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from llavar_peft.recipe.schema_fields import (
    TUNES,
    Path,
    bounds_of,
    class_for,
    fields_of,
    is_optional,
    kinds_of,
    list_element,
    look_up,
    members,
    nearest,
    suggest_field,
    type_at,
)

_LONGEST_SHOWN = 60  # characters of a value
# The kinds of error that the schema itself raises, and the fix.
_OWN_KINDS = {
    "holdout": "use for example 0.01 or 64",
    "pool": "write pool: 2, or leave it out",
    "grid": "write for example [2, 2] or [[1, 2], [2, 1], [2, 2]]",
}
_OUT_OF_RANGE = ("greater_than", "less_than", "finite_number")


def format_value(value: object) -> str:
    """Return a value as messages show it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def explain_error(error: ErrorDetails, path: Path, mapping: Mapping[str, Any]) -> tuple[str, str]:
    """Describe an error of pydantic, and its fix.

    Args:
        error: The error.
        path: The path of the value.
        mapping: The recipe as plain data.
    """
    value, error_type, name = error["input"], error["type"], str(path[-1])
    hint = type_at(mapping, path)
    parent = look_up(mapping, path[:-1])
    owner = class_for(type_at(mapping, path[:-1]), parent)
    if error_type == "unexpected_keyword_argument":
        return "unknown field", suggest_field(path, fields_of(owner) if owner else ())
    if error_type.startswith("missing"):
        return "missing", f"add a line '{name}: ...'"
    if error_type == "too_short":
        return "expected at least one entry, got an empty list", "add an entry"
    if error_type == "string_pattern_mismatch":
        return _explain_pattern(str(value))
    got = f"got {format_value(value)}"
    if error_type.startswith(_OUT_OF_RANGE) and owner is not None:
        default = {field.name: field.default for field in dataclasses.fields(owner)}[name]
        has_default = default is not dataclasses.MISSING and default is not None
        fix = "use a value in this range"
        if has_default:
            fix = f"use the default, {default}, or another value in this range"
        return f"expected {_expected(hint)} {bounds_of(owner, name)}, {got}", fix
    if error_type in _OWN_KINDS:
        shown = ascii(value) if isinstance(value, list) else format_value(value)
        return f"{error['msg']}, got {shown[:_LONGEST_SHOWN]}", _OWN_KINDS[error_type]
    if hint is None:
        return f"{error['msg'][:1].lower()}{error['msg'][1:]}, {got}", "see the field's explanation in the schema"
    if isinstance(value, dict) and error_type == "union_tag_invalid" and kinds_of(hint):
        value = value["type"]
        got = f"got {format_value(value)}"
    return f"expected {_expected(hint)}, {got}", _fix(value, hint)


def _explain_pattern(value: str) -> tuple[str, str]:
    if not value.strip() or "\0" in value:
        return f"expected a non-blank string, got {value!r}", "fill it in, or leave the field out if it is optional"
    return f"expected a folder name, got {value!r}", "use at most 100 letters, digits, '-' and '_'"


def _expected(hint: Any) -> str:
    """Describe the values of a type, as in ``expected ...``."""
    choices, may_be_list = _choices(hint), list_element(hint) is not None
    if choices:
        names = map(str, choices) if kinds_of(hint) else map(format_value, choices)
        return f"one of {', '.join(names)}{' or a list' if may_be_list else ''}"
    if class_for(hint, None) is not None:
        return "a mapping of fields"
    if may_be_list:
        return "a string or a list of strings" if str in members(hint) else "a list"
    descriptions = {bool: "true or false", int: "an integer", float: "a number"}
    return descriptions.get(members(hint)[0], "a string")


def _choices(hint: Any) -> list[object]:
    """Return the values that a type allows, if it lists them."""
    if kinds_of(hint):
        return list(kinds_of(hint))
    literals = [member for member in members(hint) if typing.get_origin(member) is typing.Literal]
    if not literals:
        return []
    choices: list[object] = [True, False] if bool in members(hint) else []
    for literal in literals:
        choices += typing.get_args(literal)
    return choices


def _fix(value: object, hint: Any) -> str:
    """Return what to write instead of a value that is not of its type."""
    choices, element = _choices(hint), list_element(hint)
    near = nearest(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else None
    if near is not None:
        return f"did you mean '{near}'?"
    if unions := kinds_of(hint):
        tune = "tune: lora or tune: {type: lora, rank: 16}"
        return f"write for example {tune if unions is TUNES else 'resolution: {type: tiles, max_tiles: 9}'}"
    if choices:
        alternative = ", or leave the field out" if is_optional(hint) else ""
        if element is not None and isinstance(value, str):
            alternative = f", or write [{value}]"
        return f"choose one of them{alternative}"
    if class_for(hint, None) is not None:
        return "write its fields below it, indented"
    kinds = members(hint)
    if str in kinds:
        return "put it in quotes" if isinstance(value, bool | int | float) else "write a name"
    if element is not None:
        return f"write [{value}]" if isinstance(value, str) else "write [first, second]"
    if int in kinds:
        return _integer_fix(value)
    return "write a number such as 0.5" if float in kinds else "write one of the two, without quotes"


def _integer_fix(value: object) -> str:
    if isinstance(value, float | str):
        try:
            number = float(value)
        except ValueError:
            number = 0.5
        if abs(number) < 1e15 and number.is_integer():
            return f"write {int(number)}"
    return "write a whole number such as 1"
