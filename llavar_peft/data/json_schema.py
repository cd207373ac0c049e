"""JSON Schemas that answers follow: reading and checking them, and checking answers against them."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llavar_peft.errors import ConfigError, DataError, MissingDependencyError, describe_reason
from llavar_peft.text_files import read_json
from llavar_peft.types import ReadableRepr, expand_home

_EXAMPLE: Final = (
    'write a JSON Schema such as {"type": "object", "properties": {"total": {"type": "string"}}, "required": ["total"]}'
)
_KEYS_OF_MAPPINGS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_KEYS_OF_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_KEYS_OF_SCHEMAS: Final = (
    "items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
"""Keywords of JSON Schema whose value holds schemas: by name, in a list, or a single one."""
_DEEPEST: Final = 100
"""Levels of nested JSON; the library that compiles schemas reads up to 128, some of which are its own."""
_LARGEST_MULTIPLE: Final = 1000
"""Multiples are counted digit by digit, with as many states as the number: 100,000 take several seconds."""
FIELDS_QUESTION: Final = "Return the fields of this image as JSON."
"""A question for all fields of a form, where no schema says which."""
_KEYS_OF_NUMBERS: Final = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaLimits:
    """What a schema may be. Those of a server's clients are smaller.

    Attributes:
        size: Length of its JSON, in characters.
        depth: Levels of nested JSON.
        parts: Number of schemas in it.
    """

    size: int = 1_000_000
    depth: int = _DEEPEST
    parts: int = 20_000


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class AnswerSchema(ReadableRepr):
    """A JSON Schema that was checked.

    Attributes:
        definition: The schema.
        where: Its name in messages: the file, or the argument.
        model: The pydantic model that it was made from; None for a schema that was given as one.
    """

    definition: Mapping[str, Any]
    where: str = "schema"
    model: Any = field(default=None)

    @classmethod
    def of(cls, given: Any, where: str = "schema", limits: SchemaLimits | None = None) -> AnswerSchema:
        """Check a schema.

        Args:
            given: A JSON Schema as a dictionary, a pydantic model class, or an ``AnswerSchema``.
            where: Its name in messages.
            limits: What it may be.

        Raises:
            ConfigError: It is no schema, is too large, or no value of finite length fulfils it.
            MissingDependencyError: ``jsonschema`` is not installed.
        """
        if isinstance(given, AnswerSchema):
            return given
        model = given if hasattr(given, "model_json_schema") else None
        if model is not None:
            given = _schema_of_model(model, where)
        if given is True:
            given = {}
        if not isinstance(given, Mapping):
            got = type(given).__name__
            raise ConfigError.at(where, f"is no JSON Schema (got {got}, expected an object)", _EXAMPLE)
        _check_size(dict(given), where, limits or SchemaLimits())
        _check_meaning(dict(given), where)
        return cls(dict(given), where, model)

    @classmethod
    def read(cls, path: str | Path) -> AnswerSchema:
        """Read a schema from a JSON file.

        Raises:
            DataError: The file is missing, or is not JSON.
            ConfigError: It holds no schema, as in ``of``.
        """
        file = expand_home(path)
        return cls.of(read_json(file, fix=_EXAMPLE), str(path))

    @property
    def text(self) -> str:
        """The schema as JSON in one line, as a question quotes it."""
        return write_fields(self.definition)

    @property
    def question(self) -> str:
        """A question for JSON that follows the schema, the same in training and in use."""
        return f"Return the fields of this image as JSON that follows this schema: {self.text}"

    def ordered(self, value: Any, part: Any = None) -> Any:
        """Return a value with the keys of its objects in the order of the schema; others follow.

        Args:
            value: What JSON can express.
            part: The schema within this one that the value follows; None is the whole.
        """
        if part is None:
            part = self.definition
        if isinstance(part, Mapping) and "$ref" in part:
            part = _resolve(self.definition, part["$ref"])
        if not isinstance(part, Mapping):
            part = {}
        if isinstance(value, list):
            return [self.ordered(element, part.get("items", {})) for element in value]
        if not isinstance(value, Mapping):
            return value
        properties = part.get("properties", {})
        names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
        return {name: self.ordered(value[name], properties.get(name, {})) for name in names}

    def problem(self, value: Any) -> str | None:
        """Return why a value does not fulfil the schema, and which part of it; None if it does."""
        from jsonschema.exceptions import best_match

        error = best_match(_validator(self.definition).iter_errors(value))
        if error is None:
            return None
        place = ".".join(map(str, error.absolute_path))
        return f"{place}: {describe_reason(error)}" if place else describe_reason(error)

    def parse(self, text: str) -> Any:
        """Return the value of an answer: an instance of the pydantic model that the schema was made from, else JSON.

        Raises:
            DataError: The answer is not JSON, or does not fulfil the schema.
        """
        try:
            value = json.loads(text, parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            fix = "allow more tokens (max_new_tokens): an answer that reaches the limit ends in the middle"
            raise DataError.at("answer", f"is not JSON ({describe_reason(error)})", fix) from error
        fix = "ask with this schema, which only allows answers that fulfil it"
        if problem := self.problem(value):
            raise DataError.at("answer", f"does not fulfil the schema ({problem})", fix)
        if self.model is None:
            return value
        try:
            return self.model.model_validate(value)
        except ValueError as error:  # what a model's validators demand is not part of its schema
            raise DataError.at("answer", f"is rejected by {self.model.__name__} ({error!r})", fix) from error


def schema_of_fields(value: Any) -> dict[str, Any]:
    """Return the schema of a form's fields: texts, and lists and objects of them. All are required, in this order."""
    if isinstance(value, Mapping):
        properties = {name: schema_of_fields(field_value) for name, field_value in value.items()}
        return {"type": "object", "properties": properties, "required": list(properties)}
    if isinstance(value, list):
        return {"type": "array", "items": schema_of_fields(value[0])}
    return {"type": "string"}


def write_fields(value: Any) -> str:
    """Return fields as an answer: JSON in one line, without spaces, in the order of the fields."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def subschemas(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all objects within a schema that are schemas themselves, each with its path, the outermost first."""
    waiting = deque([(path, schema)])
    while waiting:
        part_path, part = waiting.popleft()
        if not isinstance(part, dict):
            continue
        yield part_path, part
        start = f"{part_path}." if part_path else ""
        for name in _KEYS_OF_MAPPINGS:
            inner = part.get(name)
            if isinstance(inner, Mapping):
                waiting += [(f"{start}{name}.{key}", subschema) for key, subschema in inner.items()]
        for name in _KEYS_OF_LISTS:
            inner = part.get(name)
            if isinstance(inner, list):
                waiting += [(f"{start}{name}.{number}", subschema) for number, subschema in enumerate(inner)]
        waiting += [(f"{start}{name}", part[name]) for name in _KEYS_OF_SCHEMAS if isinstance(part.get(name), Mapping)]


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _schema_of_model(model: Any, where: str) -> Any:
    try:
        return model.model_json_schema()
    except Exception as error:  # pydantic's errors have no common base, and models bring their own
        what = f"the model {getattr(model, '__name__', model)!r} has no JSON Schema ({describe_reason(error)})"
        raise ConfigError.at(where, what, "give the model's class, with fields that JSON can express") from error


def _check_size(schema: Mapping[str, Any], where: str, limits: SchemaLimits) -> None:
    """Reject a schema that is too deep, too long, or has too many parts, before it is read recursively."""
    fix = "split it, or leave out what the answer does not need"
    level: list[Any] = [schema]  # all objects and lists at one depth
    depth = 0
    while level:
        depth += 1
        if depth > limits.depth:
            raise ConfigError.at(where, f"is nested more deeply than {limits.depth} levels", fix)
        inner: list[Any] = []
        for part in level:
            inner += part.values() if isinstance(part, Mapping) else part
        level = [part for part in inner if isinstance(part, Mapping | list)]
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError.at(where, f"is no JSON ({describe_reason(error)})", _EXAMPLE) from error
    if size > limits.size:
        raise ConfigError.at(where, f"has {size:,} characters, expected at most {limits.size:,}", fix)
    parts = sum(1 for _ in subschemas(schema))
    if parts > limits.parts:
        raise ConfigError.at(where, f"consists of {parts:,} schemas, expected at most {limits.parts:,}", fix)


def _validator(schema: Mapping[str, Any]) -> Any:
    """Return the validator of ``jsonschema`` for the draft that a schema states."""
    try:
        from jsonschema import Draft3Validator, Draft4Validator, Draft202012Validator
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise MissingDependencyError.at(
            "jsonschema", f"is not installed ({error})", "pip install 'llavar-peft[schema]'"
        ) from error
    stated = {"$schema": schema["$schema"]} if isinstance(schema.get("$schema"), str) else {}
    chosen: Any = validator_for(stated, default=Draft202012Validator)
    # Drafts 3 and 4 write limits as true and false, which is then named as what it is today: a mistake.
    return (Draft202012Validator if chosen in (Draft3Validator, Draft4Validator) else chosen)(schema)


def _check_meaning(schema: Mapping[str, Any], where: str) -> None:
    """Reject what is no JSON Schema, what cannot be compiled, and a schema that no value fulfils."""
    from jsonschema.exceptions import SchemaError, best_match

    validator = _validator(schema)
    try:
        fault = best_match(type(validator)(validator.META_SCHEMA).iter_errors(schema))
    except (RecursionError, SchemaError) as error:
        raise ConfigError.at(where, f"is no JSON Schema ({describe_reason(error)})", _EXAMPLE) from error
    if fault is not None:
        place = ".".join([where, *map(str, fault.absolute_path)])
        raise ConfigError.at(place, f"is no JSON Schema ({describe_reason(fault)})", _EXAMPLE)
    for path, part in subschemas(schema, where):
        reference, multiple = part.get("$ref", "#"), part.get("multipleOf", 1)
        if not isinstance(reference, str) or not reference.startswith("#"):
            fix = "copy the schema into $defs, and refer to it as #/$defs/NAME"
            raise ConfigError.at(f"{path}.$ref", f"refers to another file ({reference!r}); nothing is loaded", fix)
        if multiple > _LARGEST_MULTIPLE:
            what = f"got {multiple}, expected at most {_LARGEST_MULTIPLE}"
            raise ConfigError.at(f"{path}.multipleOf", what, "leave it out, and check the value afterwards")
        for name in _KEYS_OF_NUMBERS:
            if (inexact := _inexact_integer(part.get(name))) is not None:
                what = f"got {str(inexact)[:40]}, which JSON numbers of 64 bits round"
                raise ConfigError.at(f"{path}.{name}", what, "write it as text, in quotes")
    if not _can_end(schema):
        what = "no JSON of finite length fulfils it: a part requires itself"
        raise ConfigError.at(where, what, "make the property that repeats the schema optional, or allow null for it")


def _inexact_integer(value: Any) -> int | None:
    """Return an integer within a value that is no 64-bit floating-point number; None without one."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, int) and (abs(part) > sys.float_info.max or int(float(part)) != part):
            return part
        if isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return None


def _can_end(schema: Mapping[str, Any]) -> bool:
    """Return whether a finite value fulfils the schema, which its references to itself may prevent.

    References that lead to schemas with a finite value are collected until no further one is found.
    """
    targets = {part["$ref"]: _resolve(schema, part["$ref"]) for _, part in subschemas(schema) if "$ref" in part}
    finite: set[str] = set()
    while True:
        new = {name for name, part in targets.items() if name not in finite and _has_finite_value(part, finite)}
        if not new:
            return _has_finite_value(schema, finite)
        finite |= new


def _resolve(schema: Any, reference: str) -> Any:
    """Return what a reference within the schema leads to; an empty schema where that is not known."""
    for step in filter(None, reference[1:].split("/")):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping) and key in schema:
            schema = schema[key]
        elif isinstance(schema, list) and key.isdigit() and int(key) < len(schema):
            schema = schema[int(key)]
        else:
            return {}
    return schema


def _has_finite_value(part: Any, finite: set[str]) -> bool:
    """Return whether a schema has a value that needs no references but those that are known to have a finite one."""
    if not isinstance(part, Mapping):
        return part is not False
    if "$ref" in part and part["$ref"] not in finite:
        return False
    properties = part.get("properties", {})
    required = [properties[name] for name in part.get("required", ()) if name in properties]
    if part.get("type", "object") != "object":
        required = []
    if part.get("type") == "array" and part.get("minItems", 0) > 0 and "prefixItems" not in part:
        required.append(part.get("items", {}))
    required += part.get("allOf", ())
    if not all(_has_finite_value(schema, finite) for schema in required):
        return False
    choices = [part[name] for name in ("anyOf", "oneOf") if part.get(name)]
    return all(any(_has_finite_value(schema, finite) for schema in alternatives) for alternatives in choices)
