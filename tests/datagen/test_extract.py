"""Records of forms: drawn ones, and those that a language model writes, ask for JSON and answer with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llavar_peft.data.json_schema import AnswerSchema
from llavar_peft.data.record_store import parse_record
from llavar_peft.datagen.ocr.check_replies import check_fields
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_record import describe_page
from llavar_peft.datagen.synth.synth_settings import FORMS, KINDS, Style, SynthSettings
from llavar_peft.errors import ConfigError


@pytest.mark.parametrize("style", ["plain", "detailed"])
def test_drawn_forms_answer_with_their_fields(style: Style) -> None:
    settings = SynthSettings(style=style, task="extract", seed=3, width=320)
    assert settings.turns == FORMS
    kinds = set()
    for index in range(4):
        page = draw_page(settings, index)
        name, _, record, truth = describe_page(page, index, settings)
        asked, answered = parse_record(record, name).turns
        fields = json.loads(answered.text)
        assert json.dumps(fields, ensure_ascii=False, separators=(",", ":")) == answered.text
        schema = json.loads(asked.text.partition("schema: ")[2].replace("\n<image>", ""))
        jsonschema.Draft202012Validator(schema).validate(fields)
        assert AnswerSchema.of(schema).problem({**fields, "total": None}) == "total: None is not of type 'string'"
        assert [*fields] == [*schema["properties"]] == [*schema["required"]]
        assert truth["fields"] == fields
        for value in _leaves(fields):
            assert any(value in line.text for line in page.lines), value
        kinds.add(page.kind)
    assert kinds == {*FORMS}


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [leaf for one in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(one)]
    return [value]


def test_other_tasks_draw_what_they_drew() -> None:
    assert SynthSettings().turns == KINDS["detailed"]
    assert draw_page(SynthSettings(style="plain", kinds=("invoices",), width=320), 0).kind == "invoices"
    with pytest.raises(ConfigError, match=r"kind for the task extract: unknown \(got 'signs'\)"):
        SynthSettings(kinds=("signs",), task="extract")


SCHEMA = AnswerSchema.of(
    {
        "type": "object",
        "properties": {
            "shop": {"type": "string"},
            "total": {"type": ["number", "null"]},
            "kind": {"enum": ["receipt", "invoice"]},
        },
        "required": ["shop", "kind"],
    }
)
READ = ["ARGON\nTEA 2.50\nTOTAL 12.50"]


@pytest.mark.parametrize(
    ("reply", "fault", "understood"),
    [
        ('{"total": 12.5, "kind": "receipt", "shop": "Argon"}', None, True),
        ('Here it is:\n```json\n{"kind": "receipt", "shop": "ARGON", "total": null}\n```', None, True),
        ("I cannot say.", "there is no JSON in it", False),
        ('{"shop": "ARGON"}', "it does not follow the schema: 'kind' is a required property", False),
        ('{"shop": "ARGON", "kind": "bill"}', "it does not follow the schema: kind: 'bill'", False),
        ('{"shop": "ARGON", "kind": "receipt", "total": 13.5}', "'13.5': the number 13 is not in the text", True),
        ('{"shop": "Helium", "kind": "receipt"}', "'Helium': no word of it is in the text", True),
    ],
)
def test_fields_of_a_reply_are_checked(reply: str, fault: str | None, understood: bool) -> None:
    fields, found, knows = check_fields(reply, SCHEMA, READ)
    assert knows == understood
    if fault is None:
        assert found is None
        assert [*fields] == [name for name in ("shop", "total", "kind") if name in fields]
    else:
        assert found is not None
        assert found.startswith(fault)


def test_keys_follow_the_schema_at_every_level(tmp_path: Path) -> None:
    item = {"type": "object", "properties": {"name": {}, "price": {}}}
    schema = {"$defs": {"item": item}, "properties": {"items": {"items": {"$ref": "#/$defs/item"}}, "total": {}}}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    value = {"total": 1, "other": 2, "items": [{"price": 3, "name": 4}, 5]}
    expected = '{"items": [{"name": 4, "price": 3}, 5], "total": 1, "other": 2}'
    assert json.dumps(AnswerSchema.read(path).ordered(value)) == expected
