"""JSON Schemas as grammars: the tokens that may come next in an answer that has to follow a schema.

Source: llguidance. Of the libraries that do this, it runs on any device, needs no other package, and rejects keywords
that it cannot enforce instead of ignoring them.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from llavar_peft.data.json_schema import AnswerSchema, subschemas
from llavar_peft.errors import ConfigError, LlavarError, MissingDependencyError, describe_reason

if TYPE_CHECKING:
    from llavar_peft.models.processing_llavar import LlavarProcessor

_STYLE: Final[dict[str, Any]] = {
    # One optional space, as in records of this package and in what ``json.dumps`` writes. With more, models that are
    # not sure what comes next write spaces until the limit of tokens.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
_START: Final = 'start: " "? json\njson: %json '
_KEPT: Final = 64  # compiled schemas
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST: Final = 10**15 - 1  # exact as a number of JavaScript and Python
_COMBINED: Final = frozenset({"allOf", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas"})
_WORD_OF_MESSAGE: Final = re.compile(r"[A-Za-z$][A-Za-z]+")


class JsonGrammar:
    """A schema, compiled for the tokenizer of a model.

    Args:
        matcher: llguidance's matcher before the first token.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> GrammarState:
        """Return the state of an answer without tokens."""
        return GrammarState(self._matcher.deep_copy())


class GrammarState:
    """Where an answer is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._bits = b""

    @property
    def gave_up(self) -> bool:
        """Whether the grammar became too complex to be followed; the answer then ends."""
        return bool(self._matcher.is_error())

    def accept(self, token: int) -> bool:
        """Add a token to the answer, and return whether ``allowed_bits`` allowed it."""
        allowed = token // 8 < len(self._bits) and bool(self._bits[token // 8] >> token % 8 & 1)
        if allowed and not self.gave_up:
            self._matcher.consume_token(token)
        return allowed

    def allowed_bits(self) -> bytes:
        """Return one bit for each token, 1 for those that may come next."""
        self._bits = self._matcher.compute_bitmask()
        return self._bits


class GrammarCompiler:
    """Compiles schemas for one tokenizer, and keeps the results. Safe for use by several threads.

    Args:
        processor: The model's processor.

    Raises:
        MissingDependencyError: ``llguidance`` is not installed.
        ConfigError: It cannot read the tokenizer.
    """

    def __init__(self, processor: LlavarProcessor) -> None:
        self._library = _import_llguidance()
        tokenizer = processor.tokenizer
        size = max(tokenizer.get_vocab().values()) + 1
        stops = sorted(processor.stop_token_ids)
        try:
            self._tokenizer = self._library.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=stops)
        except Exception as error:  # the library raises errors of several types
            what = f"answers cannot follow a schema with this model's tokenizer ({describe_reason(error)})"
            raise ConfigError.at("schema", what, "ask without a schema, or use another model") from error
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - {*stops}
        allowed_V = torch.ones(size, dtype=torch.bool)
        allowed_V[[index for index in special if index < size]] = False
        self._ordinary_V = allowed_V
        self._limits = self._library.LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[str, JsonGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, schema: AnswerSchema) -> JsonGrammar:
        """Compile a schema, or return what was compiled before.

        Raises:
            ConfigError: The schema has keywords that are not supported, or no value fulfils it.
        """
        key = schema.text
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        grammar = self._compile(schema)
        with self._lock:
            self._compiled[key] = grammar
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return grammar

    def _compile(self, schema: AnswerSchema) -> JsonGrammar:
        """Compile a schema; raise ``ConfigError`` if the library does not support it, or no answer can begin."""
        definition = json.loads(json.dumps(schema.definition))
        _close_objects(definition)
        _shorten_numbers(definition)
        text = json.dumps({**definition, "x-guidance": _STYLE}, ensure_ascii=True)
        matcher = self._library.LLMatcher(self._tokenizer, f"{_START}{text}\n", log_level=0, limits=self._limits)
        if not matcher.is_error():
            first = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
            if matcher.is_error():
                raise _explain(matcher.get_error(), schema)
            if not int(first.sum()) or matcher.is_stopped():
                raise ConfigError.at(schema.where, "no JSON fulfils it", "look for limits that exclude each other")
            return JsonGrammar(matcher)
        raise _explain(matcher.get_error(), schema)

    def allowed_tokens(self, states: Sequence[GrammarState], size: int, device: torch.device) -> Tensor:
        """Return the tokens that may come next in answers.

        Args:
            states: Where the answers are.
            size: Number of the model's logits; rows beyond the tokenizer's are never allowed.
            device: Where the result is needed.

        Returns:
            bool ``[B, V]``. Special tokens are allowed only where an answer may end.
        """
        ordinary_V = self._ordinary_V[:size]
        rows = [torch.frombuffer(bytearray(state.allowed_bits()), dtype=torch.uint8) for state in states]
        places = torch.arange(8, dtype=torch.uint8)
        bits = (torch.stack(rows)[:, :, None] >> places) & 1
        allowed_BV = torch.zeros(len(states), size, dtype=torch.bool)
        allowed_BV[:, : len(ordinary_V)] = bits.flatten(1)[:, : len(ordinary_V)].bool() & ordinary_V
        return allowed_BV.to(device)


def _import_llguidance() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise MissingDependencyError.at(
            "llguidance", f"is not installed ({error})", "pip install 'llavar-peft[schema]'"
        ) from error
    return llguidance


def _close_objects(schema: dict[str, Any]) -> None:
    """Let objects have no other properties than those that the schema names.

    Schemas rarely say so, and a model would add properties of its own. What fulfils the result fulfils the
    schema as well. Schemas that combine objects are left as they are: each part would exclude the others' properties.
    """
    parts = [part for _, part in subschemas(schema)]
    if any("allOf" in part or ("properties" in part and _COMBINED & part.keys()) for part in parts):
        return
    for part in parts:
        properties = part.get("properties", {})
        suffice = len(properties) >= part.get("minProperties", 0) and {*part.get("required", ())} <= properties.keys()
        if properties and suffice and not {"additionalProperties", "patternProperties"} & part.keys():
            part["additionalProperties"] = False


def _shorten_numbers(schema: dict[str, Any]) -> None:
    """Let numbers have at most 15 digits before the point and 6 after it: some models write digits without end."""
    for _, part in subschemas(schema):
        stated_types = part.get("type", ())
        types = {stated_types} if isinstance(stated_types, str) else {*stated_types}
        bounds = [part[name] for name in _BOUNDS if name in part]
        if not types & {"integer", "number"} or {"enum", "const", "$ref", "allOf"} & part.keys():
            continue
        if any(abs(bound) > _LARGEST for bound in bounds):
            continue
        if not {"minimum", "exclusiveMinimum"} & part.keys():
            part["minimum"] = -_LARGEST
        if not {"maximum", "exclusiveMaximum"} & part.keys():
            part["maximum"] = _LARGEST
        are_multiples = all(bound == round(bound, 3) for bound in bounds) and len({*bounds}) == len(bounds)
        if "number" in types and "multipleOf" not in part and are_multiples:
            part["multipleOf"] = 1e-6


def _explain(message: str, schema: AnswerSchema) -> LlavarError:
    """Return the error for what the library says about a schema, with the place that it is about."""
    # After the message, the library shows the line of the grammar: all of the schema.
    message = message.partition("failed to compile JSON schema: ")[2].partition("\n   1 |")[0] or message
    lines = [line.strip() for line in message.splitlines()]
    reason = describe_reason(ValueError(lines[-1] if message.startswith("regex") else lines[0]))
    reason = reason.replace("Unimplemented keys: ", "not supported: ").replace('"', "'")
    place, keyword = _find_place(message, schema)
    fix = f"leave out {keyword}, and check the value afterwards" if keyword else "simplify the schema"
    if keyword == "oneOf":
        fix = "use anyOf, or give each choice a property with another const"
        reason = "choices that a value could fulfil together are not supported"
    return ConfigError.at(place, reason, fix)


def _find_place(message: str, schema: AnswerSchema) -> tuple[str, str]:
    """Return the path of the first keyword that a message names or quotes the value of, and the keyword."""
    words = {*_WORD_OF_MESSAGE.findall(message)} - {"type", "items", "properties", "schema", "description", "title"}
    for path, part in subschemas(schema.definition, schema.where):
        for key, value in part.items():
            quoted = isinstance(value, str) and key in ("format", "$ref", "type") and value.lstrip("#") in message
            if key in words or quoted or (key == "pattern" and message.startswith("regex")):
                return f"{path}.{key}", key
    return schema.where, ""
