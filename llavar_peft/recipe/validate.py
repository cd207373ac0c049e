"""The one place where a recipe is validated: everything that is wrong, at once, each with its place and a fix.

pydantic checks the plain dataclasses of ``schema`` for types, and ``schema_rules`` checks ranges and
combinations. Types are checked in pydantic's strict JSON mode: the lax mode would turn ``seed: true`` into 1.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from llavar_peft.errors import ConfigError, Fault
from llavar_peft.recipe.field_paths import TUNES, Path, advice, class_for, dotted, fields_of, look_up, nearest, type_at
from llavar_peft.recipe.schema import Recipe
from llavar_peft.recipe.schema_rules import find_violations
from llavar_peft.recipe.validation_messages import distinct_errors, explain_error, format_value, number_in_text

_MAX_DEPTH = 16  # a recipe is six deep; more is a YAML alias that contains itself
_STAGE = {
    "name": "unnamed",
    "data": {"records": "x"},
    "tune": {"type": "projector"},
    "optim": {"learning_rate": 1.0},
    "global_batch_size": 1,
    "micro_batch_size": 1,
}
# What stands in for a faulty field, so that the rules about the other fields can still be checked: a value that breaks
# no rule. Fields that are not named here fall back to their default.
_STAND_INS: dict[str, Any] = _STAGE | {
    "model": {"checkpoint": "x"},
    "stages": [],
    "output_dir": "x",
    "records": "x",
    "learning_rate": 1.0,
    "holdout": 1.0,
}


def recipe_from_mapping(mapping: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe from plain data, as read from YAML.

    Args:
        mapping: The recipe's fields. ``tune`` may be a name alone, as in ``tune: full``.
        where: What a message calls the source, e.g. the file's name.

    Returns:
        The recipe; every field is set.

    Raises:
        ConfigError: Something is wrong; the message and ``faults`` name everything that is.
    """
    findings = _Findings(_plain(mapping))
    recipe = findings.check()
    if recipe is None or findings.faults:
        count = len(findings.faults)
        lines = [f"  {fault.where}: {fault.what}; {fault.fix}" for fault in findings.faults]
        header = f"{where}: {count} problem{'' if count == 1 else 's'}"
        raise ConfigError("\n".join([header, *lines]), findings.faults)
    return recipe


def validate_recipe(recipe: Recipe) -> Recipe:
    """Check a recipe built in Python, whose types Python has not checked.

    Args:
        recipe: The recipe.

    Returns:
        An equal recipe whose every field has its declared type (a path object becomes a string, an int a float).

    Raises:
        ConfigError: Something is wrong; the message and ``faults`` name everything that is.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError.at("recipe", f"expected a Recipe, got {type(recipe).__name__}", "build one")
    return recipe_from_mapping(_plain(recipe), "Recipe")


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Spell a recipe as plain data: ``recipe_from_mapping`` gives an equal recipe back.

    Args:
        recipe: The recipe.

    Returns:
        Dictionaries, lists, strings, numbers, booleans and None; every field, in the order of its declaration.
    """
    plain = _plain(recipe)
    return plain if isinstance(plain, dict) else {}


@dataclasses.dataclass(frozen=True)
class _Foreign:
    """A value that no YAML file could hold as plain data; kept so that a message can show it."""

    shown: str


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        return _Foreign("nesting without end")
    if dataclasses.is_dataclass(value) and not isinstance(value, type | _Foreign):
        return {f.name: _plain(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        # A lone surrogate (a file name that is no UTF-8) has no JSON form.
        return value if _encodable(value) else _Foreign(repr(value))
    if value is None or isinstance(value, bool | int | float | _Foreign):
        return value
    return _Foreign(repr(value))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _related(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


class _Findings:
    """Collects the faults of one recipe, standing in for faulty fields so that all others are checked too."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.faults: list[Fault] = []
        self._faulty: set[Path] = set()

    def check(self) -> Recipe | None:
        if not isinstance(self.plain, dict):
            self._add((), f"expected a mapping of fields, got {format_value(self.plain)}", "write model:, stages: ...")
            return None
        self._take_out_foreign(self.plain, ())
        self._expand_tunes()
        recipe = self._typed() or self._typed()  # the second time with stand-ins
        if recipe is not None:
            for where, what, fix in find_violations(recipe):
                if not any(_related(where, dotted(path)) for path in self._faulty):
                    self.faults.append(Fault(where, what, fix))
        return recipe

    def _add(self, path: Path, what: str, fix: str) -> None:
        self._faulty.add(path)
        self.faults.append(Fault(dotted(path), what, fix))

    def _take_out_foreign(self, node: Any, path: Path) -> None:
        items: list[tuple[str | int, Any]] = []
        if isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, list):
            items = list(enumerate(node))
        for key, item in items:
            if isinstance(item, _Foreign):
                what = f"expected text, a number, a list or fields, got {item.shown}"
                self._add((*path, key), what, "put text in quotes")
                self._stand_in((*path, key))
            else:
                self._take_out_foreign(item, (*path, key))

    def _expand_tunes(self) -> None:
        stages = self.plain.get("stages")
        for index, stage in enumerate(stages if isinstance(stages, list) else ()):
            if not isinstance(stage, dict) or "tune" not in stage:
                continue
            tune, path = stage["tune"], ("stages", index, "tune")
            kind = tune.get("type") if isinstance(tune, dict) else tune
            if isinstance(kind, str) and kind in TUNES:
                stage["tune"] = tune if isinstance(tune, dict) else {"type": kind}
                continue
            near = nearest(kind, TUNES) if isinstance(kind, str) else None
            fix = f"did you mean '{near}'?" if near else "say which, e.g. tune: lora or tune: {type: lora, rank: 16}"
            self._add(
                path, f"expected one of {', '.join(TUNES)}, got {format_value(tune if kind is None else kind)}", fix
            )
            self._stand_in(path)

    def _typed(self) -> Recipe | None:
        try:
            return _adapter().validate_json(json.dumps(self.plain))
        except ValidationError as error:
            details = distinct_errors(error.errors(include_url=False), self.plain)
        unknown = [(path, detail) for path, detail in details if detail["type"] == "unexpected_keyword_argument"]
        meant = {(*path[:-1], near) for path, _ in unknown if (near := self._near(path)) is not None}
        self._faulty |= meant
        for path, detail in details:
            number = number_in_text(detail)
            if number is not None:
                look_up(self.plain, path[:-1])[path[-1]] = number  # type: ignore[index]
            elif detail["type"].startswith("missing") and path in meant:
                self._stand_in(path)  # reported already, as the unknown field that was meant to be this one
            else:
                self._add(path, *self._explained(path, detail))
                self._stand_in(path, known=detail["type"] != "unexpected_keyword_argument")
        return None

    def _names_at(self, path: Path) -> list[str]:
        cls = class_for(type_at(self.plain, path), look_up(self.plain, path))
        return list(fields_of(cls)) if cls else []

    def _near(self, path: Path) -> str | None:
        return nearest(str(path[-1]), self._names_at(path[:-1]))

    def _explained(self, path: Path, detail: ErrorDetails) -> tuple[str, str]:
        kind = detail["type"]
        if kind == "unexpected_keyword_argument":
            return "unknown field", advice(path, self._names_at(path[:-1]))
        if kind.startswith("missing"):
            return "missing", f"add a line '{path[-1]}: ...'"
        return explain_error(detail, type_at(self.plain, path))

    def _stand_in(self, path: Path, known: bool = True) -> None:
        parent, key = look_up(self.plain, path[:-1]), path[-1] if path else None
        if isinstance(parent, list) and isinstance(key, int):
            parent[key] = copy.deepcopy(_STAGE) if path[:-1] == ("stages",) else "x"
        elif isinstance(parent, dict) and isinstance(key, str):
            parent.pop(key, None)
            if known and key in _STAND_INS:
                parent[key] = copy.deepcopy(_STAND_INS[key])
