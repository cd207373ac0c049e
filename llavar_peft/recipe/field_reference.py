"""The reference of all recipe fields, generated from the schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from functools import cache
from typing import Any

from llavar_peft.recipe import resolution, schema
from llavar_peft.recipe.resolution import CrossAttention, Tiles
from llavar_peft.recipe.schema import (
    ColumnNames,
    DataConfig,
    DataSource,
    Full,
    Lora,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    Projector,
    Recipe,
    Stage,
)
from llavar_peft.recipe.schema_fields import bounds_of, fields_of, is_optional, json_schema_of, members

CONFIG_CLASSES = (
    Recipe, ModelConfig, Tiles, CrossAttention, Stage, DataConfig, DataSource, ColumnNames, Projector, Full, Lora,
    OptimConfig, ProbeConfig,
)  # fmt: skip
_TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "true or false"}


def describe_fields() -> str:
    """Return Markdown tables of all recipe fields, with a third-level section for each configuration class."""
    return "\n\n".join(_section(cls) for cls in CONFIG_CLASSES) + "\n"


@cache
def field_explanations() -> dict[str, dict[str, str]]:
    """Return the docstring under each configuration field, in one line, by class name and field name."""
    found: dict[str, dict[str, str]] = {}
    for cls in ast.parse(inspect.getsource(schema) + inspect.getsource(resolution)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        found[cls.name] = {}
        for field, after in zip(cls.body, cls.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[cls.name][field.target.id] = " ".join(str(after.value.value).split())
    return found


def _section(cls: type) -> str:
    heading = f"### {cls.__name__}\n\n{inspect.cleandoc(cls.__doc__ or '').replace('``', '`')}\n"
    rows = ["| Field | Type | Default | Constraint | Explanation |", "|---|---|---|---|---|"]
    types = fields_of(cls)
    for field in dataclasses.fields(cls):
        cells = (
            f"`{field.name}`",
            _type_name(types[field.name]),
            _default(field),
            _constraint(cls, field.name),
            field_explanations()[cls.__name__][field.name].replace("``", "`"),
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([heading, *rows])


def _type_name(hint: Any) -> str:
    names = []
    for member in members(hint):
        if dataclasses.is_dataclass(member):
            name = typing.cast(type, member).__name__
            names.append(f"[{name}](#{name.lower()})")
        elif typing.get_origin(member) is typing.Literal:
            names += [f"`{choice}`" for choice in typing.get_args(member)]
        elif typing.get_origin(member) is tuple:
            element = typing.get_args(member)[0]
            names.append("list of strings" if element is str else f"list of {_type_name(element)}")
        else:
            names.append(_TYPE_NAMES[member])
    return ", ".join(names) + ", or null" * is_optional(hint)


def _constraint(cls: type, name: str) -> str:
    schema = json_schema_of(cls, name)
    if any("minItems" in alternative for alternative in schema.get("oneOf", [schema])):
        return "not empty"
    if (cls, name) == (DataConfig, "holdout"):
        return "0 or more; from 1 up a whole number"
    return "a valid folder name" if (cls, name) == (Stage, "name") else bounds_of(cls, name).removeprefix("of ")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
        return f"`{default.type}`" if isinstance(default, Full) else "all defaults"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or isinstance(field.default, bool):
        return f"`{'null' if field.default is None else str(field.default).lower()}`"
    return f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"
