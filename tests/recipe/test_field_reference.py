"""The reference of the recipe's fields is complete and agrees with the schema."""

from __future__ import annotations

import dataclasses
import typing

from llavar_peft.constants import LINEAR_LAYERS
from llavar_peft.recipe import resolution, schema
from llavar_peft.recipe.field_reference import CONFIG_CLASSES, describe_fields, field_explanations


def rows(text: str) -> dict[str, dict[str, list[str]]]:
    """Return the cells of each field's row, by section and field."""
    found: dict[str, dict[str, list[str]]] = {}
    for section in text.split("### ")[1:]:
        lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
        found[section.partition("\n")[0]] = {line[0].strip("| `"): line[1:] for line in lines}
    return found


def test_every_field_of_every_class_has_a_row_with_an_explanation() -> None:
    modules = (schema, resolution)
    own = [v for m in modules for v in vars(m).values() if getattr(v, "__module__", "") == m.__name__]
    classes = {value for value in own if dataclasses.is_dataclass(value)}
    assert classes == set(CONFIG_CLASSES)
    found = rows(describe_fields())
    for cls in CONFIG_CLASSES:
        assert list(found[cls.__name__]) == [field.name for field in dataclasses.fields(cls)]
        for cells in found[cls.__name__].values():
            assert len(cells) == 4
            assert cells[3].removesuffix(" |").endswith(".")


def test_types_defaults_and_constraints_are_shown() -> None:
    found = rows(describe_fields())
    assert found["Stage"]["epochs"][:3] == ["number", "`1.0`", "above 0"]
    assert found["Stage"]["max_steps"][:3] == ["integer, or null", "`null`", "1 or more"]
    assert found["Stage"]["tune"][:2] == ["[Projector](#projector), [Full](#full), [Lora](#lora)", "`full`"]
    assert found["Stage"]["gradient_checkpointing"][:2] == ["true or false, `auto`", "`false`"]
    assert found["Recipe"]["stages"][:3] == ["list of [Stage](#stage)", "required", "not empty"]
    assert found["Recipe"]["seed"][2] == "from 0 to 4294967295"
    assert found["Lora"]["dropout"][2] == "from 0 to below 1"
    assert found["DataConfig"]["records"][:3] == ["string, list of strings, or null", "`null`", "not empty"]
    assert found["DataConfig"]["images"][1:3] == ["`[]`", ""]
    assert found["Lora"]["target"][2] == "not empty"


def test_explanations_are_the_docstrings_under_the_fields() -> None:
    assert field_explanations()["Stage"]["epochs"] == "Number of passes over the records."


def test_linear_layers_are_the_models() -> None:
    assert typing.get_args(schema.LinearLayer) == LINEAR_LAYERS
