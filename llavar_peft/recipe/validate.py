"""The validation of recipes: everything that is wrong is reported at once, each with its path and a fix.

pydantic checks types and the constraints of single fields, as ``schema`` declares them; ``schema_rules`` checks
combinations. Types are checked in pydantic's strict JSON mode because the lax mode would convert ``seed: true`` to 1.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llavar_peft.errors import ConfigError, Fault, describe_reason
from llavar_peft.recipe.schema import ModelConfig, Recipe
from llavar_peft.recipe.schema_fields import (
    Path,
    class_for,
    dotted,
    fields_of,
    look_up,
    nearest,
    path_of,
    recipe_adapter,
    type_at,
)
from llavar_peft.recipe.schema_rules import find_violations
from llavar_peft.recipe.validation_messages import explain_error, format_value

_MAX_DEPTH = 16  # a recipe has six levels; more are a YAML alias that contains itself
_STAGE = {
    "name": "unnamed",
    "data": {"records": "x"},
    "tune": {"type": "projector"},
    "optim": {"learning_rate": 1.0},
    "global_batch_size": 1,
    "micro_batch_size": 1,
}
# Replacements for faulty fields, which break no rule, so that the rules for the other fields can still be checked.
# Fields that are not listed fall back to their default.
_REPLACEMENTS: dict[str, Any] = _STAGE | {
    "model": {"checkpoint": "x"},
    "checkpoint": "x",
    "language_model": "x",
    "vision_tower": "x",
    "projector": "x",
    "stages": [_STAGE],
    "output_dir": "x",
    "records": "x",
    "sources": [{"records": "x"}],
    "learning_rate": 1.0,
    "holdout": 1.0,
    "max_length": 1,
}


def recipe_from_mapping(mapping: Mapping[str, Any], where: str) -> Recipe:
    """Build a recipe from plain data, as read from YAML.

    Args:
        mapping: The recipe's fields. ``tune`` may be a name alone, as in ``tune: full``.
        where: The source's name in messages, for example the file's path.

    Raises:
        ConfigError: The recipe is invalid; the message and ``faults`` list everything that is wrong.
    """
    check = _Check(_plain(mapping))
    recipe = check.run()
    if recipe is None or check.faults:
        raise ConfigError.listing(where, check.faults)
    return recipe


def model_from_mapping(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """Build the settings of a model from plain data, as read from an adapter's ``base.json``.

    Raises:
        ConfigError: A field is unknown or has the wrong type; names the first.
    """
    try:
        return TypeAdapter(ModelConfig).validate_json(json.dumps(_plain(mapping)))
    except (ValidationError, ValueError, TypeError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        reason = describe_reason(error) if first is None else f"{dotted(path_of(first['loc']))}: {first['msg']}"
        what = f"not readable as settings of a base ({reason[:200]})"
        raise ConfigError.at(where, what, "download or copy the file again") from error


def validate_recipe(recipe: Recipe) -> Recipe:
    """Check a recipe that was built in Python, which does not check types.

    Returns:
        An equal recipe in which every field has its declared type (a path object becomes a string, an int a float).

    Raises:
        ConfigError: The recipe is invalid; the message and ``faults`` list everything that is wrong.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError.at("recipe", f"expected a Recipe, got {type(recipe).__name__}", "build a Recipe")
    return recipe_from_mapping(_plain(recipe), "Recipe")


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to plain data with every field, from which ``recipe_from_mapping`` builds an equal recipe."""
    plain = _plain(recipe)
    return plain if isinstance(plain, dict) else {}


@dataclasses.dataclass(frozen=True)
class _NotPlain:
    """A value that JSON cannot express, as messages show it."""

    shown: str


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a recipe or a part of it as mappings, lists and scalars; ``_NotPlain`` in the place of anything else."""
    if depth > _MAX_DEPTH:
        return _NotPlain("endless nesting")
    if dataclasses.is_dataclass(value) and not isinstance(value, type | _NotPlain):
        return {f.name: _plain(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        # A lone surrogate (from a file name that is not UTF-8) cannot be written as JSON.
        return value if _encodable(value) else _NotPlain(repr(value))
    if value is None or isinstance(value, bool | int | float | _NotPlain):
        return value
    return _NotPlain(repr(value))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _overlap(path: str, other: str) -> bool:
    """Return whether one of two dotted paths is that of the other, or of a field within it."""
    return path == other or path.startswith(other + ".") or other.startswith(path + ".")


class _Check:
    """The check of one recipe; faulty fields are replaced so that all others are checked too."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.faults: list[Fault] = []
        self._faulty: set[Path] = set()

    def run(self) -> Recipe | None:
        """Return the recipe, with replacements for faulty fields; None if it has errors that hide others."""
        if not isinstance(self.plain, dict):
            self._add((), f"expected a mapping of fields, got {format_value(self.plain)}", "write model:, stages: ...")
            return None
        self._replace_not_plain(self.plain, ())
        model = self.plain.get("model")
        if isinstance(model, dict) and isinstance(model.get("resolution"), str):
            model["resolution"] = {"type": model["resolution"]}
        stages = self.plain.get("stages")
        for stage in stages if isinstance(stages, list) else ():
            if isinstance(stage, dict) and isinstance(stage.get("tune"), str):
                stage["tune"] = {"type": stage["tune"]}
        recipe = self._validate() or self._validate()  # the second time with replacements
        if recipe is not None:
            for where, what, fix in find_violations(recipe):
                if not any(_overlap(where, dotted(path)) for path in self._faulty):
                    self.faults.append(Fault(where, what, fix))
        return recipe

    def _add(self, path: Path, what: str, fix: str) -> None:
        self._faulty.add(path)
        self.faults.append(Fault(dotted(path), what, fix))

    def _replace_not_plain(self, node: Any, path: Path) -> None:
        """Report and replace all values that are not plain data."""
        items: list[tuple[str | int, Any]] = []
        if isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, list):
            items = list(enumerate(node))
        for key, item in items:
            if isinstance(item, _NotPlain):
                what = f"expected text, a number, a list or fields, got {item.shown}"
                self._add((*path, key), what, "put text in quotes")
                self._replace((*path, key))
            else:
                self._replace_not_plain(item, (*path, key))

    def _validate(self) -> Recipe | None:
        """Return the recipe; None if fields are faulty, which are then reported and replaced."""
        try:
            return recipe_adapter().validate_json(json.dumps(self.plain))
        except ValidationError as error:
            details = [(path_of(detail["loc"]), detail) for detail in error.errors(include_url=False)]
        unknown = [path for path, detail in details if detail["type"] == "unexpected_keyword_argument"]
        similar = [self._intended_path(path) for path in unknown]
        intended = {path for path in similar if path is not None}
        self._faulty |= intended
        messages = [explain_error(detail, path, self.plain) for path, detail in details]
        for (path, detail), message in zip(details, messages, strict=True):
            if detail["type"] == "too_short" and detail["input"]:
                continue  # only short because its faulty entries, reported themselves, do not count
            if not (detail["type"].startswith("missing") and path in intended):  # reported as the misspelled field
                self._add(path, *message)
            self._replace(path, known=path not in unknown)
        return None

    def _intended_path(self, path: Path) -> Path | None:
        """Return the field that an unknown one with a similar name is probably meant to be."""
        parent = class_for(type_at(self.plain, path[:-1]), look_up(self.plain, path[:-1]))
        name = nearest(str(path[-1]), fields_of(parent)) if parent else None
        return None if name is None else (*path[:-1], name)

    def _replace(self, path: Path, known: bool = True) -> None:
        """Replace a faulty value, or remove it if the field is unknown or has a default."""
        parent = look_up(self.plain, path[:-1])
        key = path[-1] if path else None
        if isinstance(parent, list) and isinstance(key, int):
            entries = {"stages": _STAGE, "target": "q_proj", "sources": {"records": "x"}}
            parent[key] = copy.deepcopy(entries.get(str(path[-2]), "x"))
        elif isinstance(parent, dict) and isinstance(key, str):
            parent.pop(key, None)
            if known and key in _REPLACEMENTS:
                parent[key] = copy.deepcopy(_REPLACEMENTS[key])
