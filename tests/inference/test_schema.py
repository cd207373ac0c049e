"""Answers that follow a JSON Schema: they parse and validate, whatever the model, the tokenizer and the batch."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import llavar_peft
from llavar_peft import Chat, ModelConfig, build_model, cli, parse_answer
from llavar_peft.data.json_schema import AnswerSchema, SchemaLimits
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.json_grammar import GrammarCompiler
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer

SCHEMAS = int(os.environ.get("LLAVAR_SCHEMAS", "40"))
"""Random schemas, half of them for each of two tokenizers; 1,000 take half a minute on one core."""
MODERN = Path(llavar_peft.__file__).parent / "assets/tiny_modern"
RECEIPT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "shop": {"type": "string", "maxLength": 6},
        "date": {"type": "string", "format": "date"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2},
        "total": {"type": ["number", "null"]},
    },
    "required": ["shop", "date", "items", "total"],
    "$defs": {
        "item": {"type": "object", "properties": {"price": {"type": "string", "pattern": "^[0-9]{1,3}[.][0-9]{2}$"}}}
    },
}  # fmt: skip


def _untrained(language_model: Path, vision_tower: Path) -> Engine:
    """Return a model whose weights of the language model are random, so that it prefers no token."""
    parts = {"language_model": str(language_model), "vision_tower": str(vision_tower)}
    model, processor = build_model(ModelConfig(**parts, dtype="float32"), seed=5)  # type: ignore[arg-type]
    torch.manual_seed(3)
    for parameter in model.model.language_model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return Engine(model.eval(), processor)


@pytest.fixture(scope="module")
def engines(engine: Engine) -> list[Engine]:
    tiny = MODERN.with_name("tiny")
    return [
        _untrained(tiny / "language_model", tiny / "vision_tower"),
        _untrained(MODERN / "language_model", MODERN / "vision_tower"),
    ]


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=6)
EXACT = st.integers(-(2**53), 2**53)
LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3), st.integers(0, 5),
    ),
    st.sampled_from([
        {"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"},
        {"type": "number", "exclusiveMinimum": 0}, {"type": "integer", "maximum": -7}, {"type": ["integer", "null"]},
        {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
        {"type": "string", "format": "date"}, {"type": "string", "format": "time"},
        {"type": "string", "format": "uuid"}, {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,4}$"},
        {"type": "string", "pattern": "^[0-9]+[.][0-9]{2}$", "maxLength": 9},
    ]),
    st.lists(NAMES | EXACT | st.booleans() | st.none(), min_size=1, max_size=4).map(lambda one: {"enum": one}),
    (st.lists(NAMES, max_size=2) | st.dictionaries(NAMES, EXACT, max_size=2)).map(lambda one: {"const": one}),
)  # fmt: skip


def _object(properties: dict[str, Any], optional: int) -> dict[str, Any]:
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names[: len(names) - optional], "title": "T"}


def _recursive(leaf: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that contains itself: its answers end, because each level may be null."""
    following = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    node = {"type": "object", "properties": {"value": leaf, "next": following}, "required": ["value"]}
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def _schemas(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, min_size=1, max_size=4), st.integers(0, 2)),
        st.builds(lambda one, most: {"type": "array", "items": one, "maxItems": most}, inner, st.integers(0, 3)),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda some: {"type": "array", "prefixItems": some, "items": False, "minItems": len(some)}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
        LEAVES.map(_recursive),
    )


NESTED = st.recursive(LEAVES, lambda inner: _schemas(inner).filter(lambda one: "$defs" not in one), max_leaves=6)


@pytest.mark.slow
@given(schemas=st.lists(NESTED | _schemas(LEAVES), min_size=10, max_size=10), seed=st.integers(0, 2**32))
@settings(max_examples=max(1, SCHEMAS // 20), suppress_health_check=list(HealthCheck), database=None)
def test_answers_to_random_schemas_parse_and_validate(
    engines: list[Engine], schemas: list[dict[str, Any]], seed: int
) -> None:
    for engine in engines:
        chat = Chat(engine)
        how = Sampling(temperature=1.0, top_k=0, max_new_tokens=700, seed=seed)
        free = chat.request(None, "Read.", sampling=Sampling(max_new_tokens=3))
        requests = [chat.request(None, "Read.", sampling=how, schema=schema) for schema in schemas]
        for schema, answer in zip(schemas, answer_all(engine, [*requests, free]), strict=False):
            assert answer.finish_reason == "stop", (schema, answer)
            value = json.loads(answer.text)
            jsonschema.Draft202012Validator(schema).validate(value)
            assert parse_answer(answer.text, schema) == value


def test_rows_without_a_schema_are_answered_as_alone(engines: list[Engine]) -> None:
    chat = Chat(engines[0])
    how = Sampling(temperature=0.9, max_new_tokens=30, seed=7, logprobs=True)
    free = [chat.request(None, question, sampling=how) for question in ("Read.", "What does it say?")]
    bound = chat.request(None, "Read.", sampling=how, schema=RECEIPT)
    alone = chat.answer(free)
    mixed = chat.answer([free[0], bound, free[1]])
    assert [one.ids for one in (mixed[0], mixed[2])] == [one.ids for one in alone]
    assert mixed[1].ids == chat.answer([bound])[0].ids
    assert mixed[1].logprobs is not None
    assert all(-1e4 < one <= 0 for one in mixed[1].logprobs)


@pytest.mark.parametrize("number", [0, 1])
def test_no_special_token_is_chosen(engines: list[Engine], number: int) -> None:
    """Even if the model prefers them: text in a string consists of ordinary tokens, and only the end allows the end."""
    engine = engines[number]
    stops = engine.processor.stop_token_ids
    tokenizer = engine.processor.tokenizer
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    logits = torch.zeros(1, engine.base_model.config.text_config.vocab_size)
    state = engine.compile_schema({"type": "string", "maxLength": 3}).start()  # type: ignore[union-attr]
    for text in ('"', "a", "b", "c", '"'):
        allowed = engine.grammars.allowed_tokens([state], logits.shape[1], logits.device)[0]
        assert not allowed[[*special, *range(len(tokenizer), logits.shape[1])]].any()
        assert state.accept(tokenizer.convert_tokens_to_ids(text))
    allowed = engine.grammars.allowed_tokens([state], logits.shape[1], logits.device)[0]
    assert {*allowed.nonzero()[:, 0].tolist()} == stops


def test_an_answer_that_is_cut_says_so(engines: list[Engine]) -> None:
    chat = Chat(engines[0])
    schema = {"type": "array", "items": {"type": "string", "minLength": 50}, "minItems": 3}
    request = chat.request(None, "Read.", sampling=Sampling(max_new_tokens=20, seed=1), schema=schema)
    (answer,) = chat.answer([request])
    assert (answer.finish_reason, len(answer.ids)) == ("length", 20)
    with pytest.raises(DataError, match=r"is not JSON .* allow more tokens \(max_new_tokens\)"):
        parse_answer(answer.text, schema)


def test_a_schema_that_becomes_too_complex_ends_the_answer_alone(engines: list[Engine]) -> None:
    engine = Engine(engines[0].model, engines[0].processor)
    library = engine.grammars._library
    engine.grammars._limits = library.LLParserLimits(max_items_in_row=2, verbose_errors=False)
    chat = Chat(engine)
    hard = chat.request(None, "Read.", schema={"type": "array", "items": {"type": "integer"}})
    easy = chat.request(None, "Read.", sampling=Sampling(max_new_tokens=5, seed=1))
    ended, free = chat.answer([hard, easy])
    assert ended.finish_reason == "length"
    assert len(ended.ids) < 5
    assert free.ids == chat.answer([easy])[0].ids


class Item(BaseModel):
    name: str = Field(max_length=4)
    price: float = Field(ge=0)


class Receipt(BaseModel):
    kind: Literal["receipt", "invoice"]
    items: list[Item] = Field(max_length=2)
    parent: Receipt | None = None


def test_a_pydantic_model(engines: list[Engine], images: list[Path]) -> None:
    for engine in engines:
        chat = Chat(engine)
        answer = chat.ask(images[0], schema=Receipt, seed=3, temperature=1.0, max_new_tokens=700)
        assert isinstance(parse_answer(answer, Receipt), Receipt)
        pieces = list(chat.stream(images[0], schema=Receipt, seed=3, temperature=1.0, max_new_tokens=700))
        assert "".join(pieces) == answer
        assert len(pieces) > 3
        dialogue = chat.conversation()
        dialogue.send("Hello", max_new_tokens=3)
        said = dialogue.send("Read.", schema=RECEIPT, seed=3, max_new_tokens=700)
        assert set(parse_answer(said, RECEIPT)) == {"shop", "date", "items", "total"}


def test_the_tokenizer_of_llama(shared_dir: Path, engines: list[Engine]) -> None:
    folder = shared_dir / "reference/tokenizer"
    if not folder.is_dir():
        pytest.skip(f"LLaMA's tokenizer.model is not at {folder}")
    tokenizer = load_tokenizer(folder)
    add_image_tokens(tokenizer)

    class _Processor:
        stop_token_ids = frozenset({2})

    _Processor.tokenizer = tokenizer  # type: ignore[attr-defined]
    compiler = GrammarCompiler(_Processor())  # type: ignore[arg-type]
    state = compiler.compile(AnswerSchema.of(RECEIPT)).start()
    text = '{"shop": "Zü日🎈", "date":"2024-02-29", "items": [{"price": "12.50"}],"total":null}'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in [*ids, 2]:
        assert compiler.allowed_tokens([state], len(tokenizer), torch.device("cpu"))[0, token], token
        assert state.accept(token)
    assert not state.gave_up


BAD: tuple[tuple[Any, str], ...] = (
    (3, "schema: is no JSON Schema (got int"),
    ([{}], "schema: is no JSON Schema (got list"),
    (Engine, "schema: is no JSON Schema (got type"),
    ({"$schema": ["x"], "type": "object"}, "schema.$schema: is no JSON Schema"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "exclusiveMinimum": True}, "exclusiveMinimum: is no"),
    ({"$schema": "http://json-schema.org/draft-03/schema#", "$ref": 5}, "is no JSON Schema"),
    ({"type": "strin"}, "schema.type: is no JSON Schema ('strin'"),
    ({"properties": {"a": {"minimum": "3"}}}, "schema.properties.a.minimum: is no JSON Schema"),
    ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "schema.properties.a.uniqueItems: not supported"),
    ({"anyOf": [{"type": "null"}, {"not": {"type": "string"}}]}, "schema.anyOf.1.not: not supported"),
    ({"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 4}]}, "schema.oneOf: choices that a value could"),
    ({"properties": {"when": {"type": "string", "format": "nope"}}}, "schema.properties.when.format: Unknown format"),
    ({"type": "string", "pattern": "(a"}, "schema.pattern: "),
    ({"type": "string", "pattern": "^(?=a)b"}, "schema.pattern: "),
    ({"$ref": "#/$defs/none"}, "schema.$ref: "),
    ({"$ref": "file:///etc/passwd"}, "schema.$ref: refers to another file"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "schema.minLength: "),
    ({"enum": []}, "schema: "),
    ({"$ref": "#"}, "no JSON of finite length"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no JSON of finite length"),
    ({"type": "integer", "multipleOf": 99991}, "schema.multipleOf: got 99991"),
    ({"const": {1, 2}}, "schema: is no JSON"),
    ({"const": {"a": [2**53 + 1]}}, "schema.const: got 9007199254740993, which"),
    ({"properties": {"a": {"enum": [-(10**400)]}}}, "schema.properties.a.enum: got -1000"),
)


@pytest.mark.parametrize(("schema", "message"), BAD, ids=[str(schema)[:40] for schema, _ in BAD])
def test_schemas_that_are_rejected(engines: list[Engine], schema: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Chat(engines[0]).ask(None, "Read.", schema=schema)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_schema_may_be_deep_and_large_only_within_limits() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ConfigError, match="more deeply than 100 levels"):
        AnswerSchema.of(deep)
    with pytest.raises(ConfigError, match="consists of 11 schemas"):
        AnswerSchema.of({"anyOf": [{"type": "null"}] * 10}, limits=SchemaLimits(parts=10))


def test_the_commands(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, questions, answers = (tmp_path / name for name in ("schema.json", "questions.jsonl", "answers.jsonl"))
    form = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
    schema.write_text(json.dumps(form))
    questions.write_text("".join(json.dumps({"question_id": n, "text": f"What is {n}?"}) + "\n" for n in range(3)))
    options = ["--model", str(checkpoint), "--schema", str(schema), "--greedy"]
    assert cli.main(["ask", *options, "Read."]) == 0
    assert isinstance(parse_answer(capsys.readouterr().out, form)["total"], int)
    assert cli.main(["ask", *options]) == 0  # the question is that for the fields
    assert isinstance(parse_answer(capsys.readouterr().out, form)["total"], int)
    assert cli.main(["ask", "--model", str(checkpoint), "--greedy"]) == 2
    assert "give --schema to ask for its fields" in capsys.readouterr().err
    assert cli.main(["generate", *options, "--questions", str(questions), "--answers", str(answers)]) == 0
    for line in answers.read_text().splitlines():
        assert isinstance(parse_answer(json.loads(line)["text"], form)["total"], int)
    monkeypatch.setattr("sys.stdin", io.StringIO("Read.\n"))
    capsys.readouterr()
    assert cli.main(["chat", *options]) == 0
    assert isinstance(parse_answer(capsys.readouterr().out, form)["total"], int)
    for text, message in (("{", "not valid JSON"), ("[]", "is no JSON Schema (got list"), ("", "the file is empty")):
        schema.write_text(text)
        assert cli.main(["ask", *options, "Read."]) == 2
        assert message in capsys.readouterr().err
