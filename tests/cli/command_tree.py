"""The options and arguments of every command, as plain data."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo


def describe_commands(app: typer.Typer, words: str = "llavar-peft") -> dict[str, list[dict[str, Any]]]:
    """Return the parameters of an application and of its commands, by the words that a user types."""
    found = {words: _parameters(app.registered_callback.callback)} if app.registered_callback else {}
    for command in app.registered_commands:
        found[f"{words} {command.name}"] = _parameters(command.callback)
    for group in app.registered_groups:
        found |= describe_commands(group.typer_instance, f"{words} {group.name}")
    return found


def _parameters(function: Callable[..., None]) -> list[dict[str, Any]]:
    hints = get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters.values()
    return [_describe(one, hints[one.name]) for one in given if get_origin(hints[one.name]) is Annotated]


def _describe(parameter: inspect.Parameter, hint: Any) -> dict[str, Any]:
    annotation, info = get_args(hint)
    kind, many = annotation, False
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is list:
        (kind,), many = get_args(kind), True
    is_literal, is_enum = get_origin(kind) is Literal, isinstance(kind, type) and issubclass(kind, Enum)
    required = parameter.default is inspect.Parameter.empty
    # Within `Annotated`, typer keeps the first name where it keeps a default otherwise.
    declared = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    about = {
        "kind": "argument" if isinstance(info, ArgumentInfo) else "option",
        "names": [name for text in declared for name in text.split("/")] or [info.metavar or parameter.name],
        "type": "choice" if is_literal or is_enum else kind.__name__,
        "default": None if required else _plain(parameter.default),
        "required": required,
        "several": many,
    }
    if is_literal or is_enum:
        about["choices"] = [_plain(one) for one in (get_args(kind) if is_literal else kind)]
    return about | {
        name: value
        for name in ("min", "max", "envvar")
        if (value := getattr(info, name, None)) is not None
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
