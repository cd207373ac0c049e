"""Recipes as YAML: strict parsing, overrides of single fields, and output with explanations."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import yaml

from llavar_peft.errors import ConfigError, Fault
from llavar_peft.recipe.field_reference import field_explanations
from llavar_peft.recipe.schema import Recipe
from llavar_peft.recipe.schema_fields import (
    TUNES,
    Path,
    class_for,
    dotted,
    fields_of,
    is_optional,
    kinds_of,
    members,
    step,
    suggest_field,
)
from llavar_peft.recipe.validate import recipe_to_mapping

_MOST_VALUES: Final = 100_000  # of a recipe with its aliases written out


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which in addition rejects duplicate keys; YAML would silently drop the first one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not text", problem_mark=key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return a node's value. A value that is not of its type, as in ``!!int x``, is reported with its position."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"a value is no valid {kind}", problem_mark=node.start_mark) from error

    def get_single_node(self) -> yaml.Node | None:
        """Return the document's node. Aliases to aliases, which could stand for any number of values, are rejected."""
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values of a node with its aliases written out.

    Raises:
        MarkedYAMLError: They are too many, or endless.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES  # of a node within itself
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else iter(node.value)
        known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    if known[id(node)] > _MOST_VALUES:
        raise yaml.MarkedYAMLError(problem="its aliases stand for too many values", problem_mark=node.start_mark)
    return known[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML into dictionaries, lists and scalars, without executing anything.

    Args:
        text: The YAML text.
        where: The source's name in messages.

    Raises:
        ConfigError: The text is not YAML, or it has a duplicate key.
    """
    try:
        # The loader is a SafeLoader: it creates plain data only.
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = error.problem or "invalid YAML"
    except yaml.reader.ReaderError as error:
        lines = text[: error.position].split("\n")
        place, problem = f"{where}:{len(lines)}:{len(lines[-1]) + 1}", f"invalid character {chr(error.character)!a}"
    except RecursionError:
        place, problem = where, "invalid YAML (nested too deeply)"
    raise ConfigError.at(place, problem, "correct this line; llavar-peft recipe show llavar-13b prints a valid file")


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a recipe in plain data with single fields set. Their types are not checked here.

    Args:
        mapping: The recipe's fields.
        overrides: Each ``path=value``, e.g. ``stages.0.optim.learning_rate=1e-3``; the value is YAML.

    Raises:
        ConfigError: A path does not exist, or an override is not of the form ``path=value``.
    """
    changed = copy.deepcopy(dict(mapping))
    faults: list[Fault] = []
    for override in overrides:
        try:
            _apply(changed, override)
        except ConfigError as error:
            faults.extend(error.faults)
    if faults:
        raise ConfigError.listing("overrides", faults)
    return changed


def _apply(mapping: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError.at(override, "expected path=value", "write for example stages.0.epochs=2")
    path: Path = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
    node: Any = mapping
    hint: Any = Recipe
    for depth, part in enumerate(path):
        _check_step(node, hint, path[: depth + 1])
        hint = step(hint, part, node)
        if depth == len(path) - 1:
            node[part] = _parse_value(text, hint, key)
            return
        node[part] = _expand(node[part] if isinstance(part, int) else node.get(part), hint)
        node = node[part]


def _check_step(node: Any, hint: Any, path: Path) -> None:
    """Raise ``ConfigError`` unless the last part of ``path`` is a key of ``node``, whose declared type is ``hint``."""
    last, parent = path[-1], dotted(path[:-1])
    if isinstance(last, int):
        if not isinstance(node, list):
            raise ConfigError.at(dotted(path), f"{parent} is not a list", f"set {parent} as a whole")
        if last >= len(node):
            count = f"the list has {len(node)} entries, counted from 0"
            raise ConfigError.at(dotted(path), f"no entry {last}", count)
        return
    cls = class_for(hint, node)
    if isinstance(node, list):
        raise ConfigError.at(dotted(path), f"unknown path: {parent} is a list", "count from 0, e.g. stages.0.epochs")
    if cls is None or not isinstance(node, dict):
        raise ConfigError.at(dotted(path), f"unknown path: {parent} has no fields", f"set {parent} as a whole")
    if last not in fields_of(cls):
        raise ConfigError.at(dotted(path), "unknown field", suggest_field(path, fields_of(cls)))


def _expand(node: Any, hint: Any) -> Any:
    """Return a mapping for the short form of a union and for a missing mapping, so that their fields can be set."""
    if kinds := kinds_of(hint):
        kind = node if isinstance(node, str) else "full" if kinds is TUNES else next(iter(kinds))
        return node if isinstance(node, dict) or kind not in kinds else {"type": kind}
    return {} if node is None and class_for(hint, {}) is not None else node


def _parse_value(text: str, hint: Any, key: str) -> Any:
    value = parse_yaml(text, f"override {key}")
    if str in members(hint) and not isinstance(value, str | list) and not (value is None and is_optional(hint)):
        return text  # in a text field, 2024 and no are names, not a number and a boolean
    return value


def dump_recipe(recipe: Recipe) -> str:
    """Format a recipe as YAML with every field, each explained where it first occurs.

    Returns:
        The text, from which ``load_recipe`` reads an equal recipe.
    """
    return "\n".join(_dump_mapping(recipe_to_mapping(recipe), Recipe, set())) + "\n"


def _dump_mapping(mapping: Mapping[str, Any], cls: type, explained: set[tuple[type, str]]) -> Iterator[str]:
    for name, value in mapping.items():
        text = "" if (cls, name) in explained else field_explanations()[cls.__name__][name]
        comment = f"  # {text.replace('``', '')}" if text else ""
        explained.add((cls, name))
        hint = fields_of(cls)[name]
        below = class_for(hint, value)
        if isinstance(value, dict) and below is not None:
            yield f"{name}:{comment}"
            yield from (f"  {line}" for line in _dump_mapping(value, below, explained))
        elif value and isinstance(value, list) and isinstance(value[0], dict):
            yield f"{name}:{comment}"
            for item in value:
                marks = iter("-")
                element = class_for(step(hint, 0, value), item)
                for line in _dump_mapping(item, element, explained) if element else ():
                    yield f"  {next(marks, ' ')} {line}"
        else:
            yield f"{name}: {_dump_scalar(value)}{comment}"


def _dump_scalar(value: Any) -> str:
    # Line breaks and other characters that an editor might change are written as escapes.
    readable = "".join(map(str, value if isinstance(value, list) else [value])).isprintable()
    style = None if readable else '"'
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=readable, default_style=style, width=float("inf")
    )
    return str(text).removesuffix("...\n").strip("\n")
