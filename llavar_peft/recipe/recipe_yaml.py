"""Recipes as text: YAML read strictly, single settings overridden, and a recipe written out with its explanations."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from llavar_peft.errors import ConfigError, Fault
from llavar_peft.recipe import schema
from llavar_peft.recipe.field_paths import TUNES, Path, advice, class_for, dotted, fields_of, members, optional, step
from llavar_peft.recipe.schema import Recipe
from llavar_peft.recipe.validate import recipe_to_mapping


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key written twice is an error: the first one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is written twice", problem_mark=key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML without executing anything.

    Args:
        text: The YAML text.
        where: What a message calls the source.

    Returns:
        Dictionaries, lists and scalars.

    Raises:
        ConfigError: It is no YAML, or a key is written twice.
    """
    try:
        # The loader is a SafeLoader: it makes plain data only.
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = error.problem or "not readable as YAML"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place, problem = where, f"not readable as YAML ({str(error).splitlines()[0] if str(error) else 'too deep'})"
    raise ConfigError.at(place, problem, "fix this line; llavar-peft recipe show llavar-13b prints a valid file")


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set single fields of a recipe that is still plain data.

    Args:
        mapping: The recipe's fields; stays as it is.
        overrides: Each ``path=value``, e.g. ``stages.0.optim.learning_rate=1e-3``; the value is YAML.

    Returns:
        A copy with the values set. Their types are checked when the whole recipe is.

    Raises:
        ConfigError: A path leads nowhere, or an override is not written as ``path=value``.
    """
    changed = copy.deepcopy(dict(mapping))
    faults: list[Fault] = []
    for override in overrides:
        try:
            _apply(changed, override)
        except ConfigError as error:
            faults.extend(error.faults)
    if faults:
        count = len(faults)
        lines = [f"  {fault.where}: {fault.what}; {fault.fix}" for fault in faults]
        raise ConfigError("\n".join([f"overrides: {count} problem{'' if count == 1 else 's'}", *lines]), faults)
    return changed


def _apply(mapping: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError.at(override, "expected path=value", "write for example stages.0.epochs=2")
    path: Path = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
    node: Any = mapping
    hint: Any = Recipe
    for depth, part in enumerate(path):
        _require_place(node, hint, path[: depth + 1])
        hint = step(hint, part, node)
        if depth == len(path) - 1:
            node[part] = _value(text, hint, key)
            return
        node[part] = _opened(node[part] if isinstance(part, int) else node.get(part), hint)
        node = node[part]


def _require_place(node: Any, hint: Any, path: Path) -> None:
    """Raise ``ConfigError`` unless ``path`` is one step further down from ``node``, whose type is ``hint``."""
    last = path[-1]
    if isinstance(last, int):
        if not isinstance(node, list):
            raise ConfigError.at(dotted(path), "there is no list here", f"set {dotted(path[:-1])} as a whole")
        if last >= len(node):
            here = f"there are {len(node)} here, counted from 0"
            raise ConfigError.at(dotted(path), f"there is no number {last}", here)
        return
    cls = class_for(hint, node)
    if cls is None or not isinstance(node, dict):
        what = "unknown path: a list stands here" if isinstance(node, list) else "unknown path: no fields stand here"
        fix = "count from 0, e.g. stages.0.epochs" if isinstance(node, list) else f"set {dotted(path[:-1])} as a whole"
        raise ConfigError.at(dotted(path), what, fix)
    if last not in fields_of(cls):
        raise ConfigError.at(dotted(path), "unknown field", advice(path, fields_of(cls)))


def _opened(node: Any, hint: Any) -> Any:
    """Return a node whose fields can be set: ``tune``'s short form and fields left at their default are spelt out."""
    if len(members(hint)) > 1 and class_for(hint, {"type": "full"}) is not None:
        kind = node if isinstance(node, str) else "full"
        return node if isinstance(node, dict) or kind not in TUNES else {"type": kind}
    return {} if node is None and class_for(hint, {}) is not None else node


def _value(text: str, hint: Any, key: str) -> Any:
    value = parse_yaml(text, f"override {key}")
    wants_text = str in members(hint)
    if wants_text and not isinstance(value, str | list) and not (value is None and optional(hint)):
        return text  # a folder named 2024 or no is a name, not a number or a boolean
    return value


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every field and, where a field comes first, its explanation.

    Args:
        recipe: The recipe.

    Returns:
        The text; ``load_recipe`` reads an equal recipe from it.
    """
    return "\n".join(_dumped(recipe_to_mapping(recipe), Recipe, set())) + "\n"


def _dumped(mapping: Mapping[str, Any], cls: type, said: set[tuple[type, str]]) -> Iterator[str]:
    for name, value in mapping.items():
        explanation = "" if (cls, name) in said else _explanations().get(cls.__name__, {}).get(name, "")
        said.add((cls, name))
        hint = fields_of(cls)[name]
        below = class_for(hint, value)
        if isinstance(value, dict) and below is not None:
            yield f"{name}:{explanation}"
            yield from (f"  {line}" for line in _dumped(value, below, said))
        elif value and isinstance(value, list) and isinstance(value[0], dict):
            yield f"{name}:{explanation}"
            for item in value:
                marks = iter("-")
                element = class_for(step(hint, 0, value), item)
                for line in _dumped(item, element, said) if element else ():
                    yield f"  {next(marks, ' ')} {line}"
        else:
            yield f"{name}: {_scalar(value)}{explanation}"


def _scalar(value: Any) -> str:
    # Line breaks in all their forms, and other characters that an editor might change, are written as escapes.
    readable = "".join(value if isinstance(value, list) else [str(value)]).isprintable()
    style = None if readable else '"'
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=readable, default_style=style, width=float("inf")
    )
    return str(text).removesuffix("...\n").strip("\n")


@cache
def _explanations() -> dict[str, dict[str, str]]:
    """Return the docstring under each configuration field, as a comment, by class and field."""
    found: dict[str, dict[str, str]] = {}
    for cls in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        found[cls.name] = {}
        for field, after in zip(cls.body, cls.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                words = " ".join(str(after.value.value).replace("``", "").split())
                found[cls.name][field.target.id] = f"  # {words}"
    return found
