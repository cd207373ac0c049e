"""The sources of a stage's records in a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from llavar_peft import DataConfig, Recipe
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.data_sources import columns_of, paths_of, size_of_epoch, sources_of
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe, parse_yaml
from llavar_peft.recipe.schema import ColumnNames, DataSource
from llavar_peft.recipe.validate import recipe_from_mapping, validate_recipe
from tests.recipe.test_validation import MAPPING, STAGE, problems


def mapping(data: dict[str, Any]) -> dict[str, Any]:
    return {**MAPPING, "stages": [{**STAGE, "data": data}]}


def test_a_recipe_with_sources_is_read_and_written() -> None:
    data = {
        "images": "all",
        "sources": [
            {"records": "a.json", "weight": 2, "columns": {"question": "frage", "image": "bild"}},
            {"records": "hf://org/name", "split": "train[:10]", "config": "x", "streaming": True, "images": ["i"]},
        ],
    }
    recipe = recipe_from_mapping(mapping(data), "r.yaml")
    first, second = sources_of(recipe.stages[0].data)
    columns = ColumnNames(question="frage", image="bild")
    assert first == DataSource(records="a.json", images="all", weight=2.0, columns=columns)
    assert columns_of(first) == (("image", "bild"), ("question", "frage"))
    assert columns_of(second) == ()
    assert second == DataSource(records="hf://org/name", images=("i",), split="train[:10]", config="x", streaming=True)
    assert recipe_from_mapping(parse_yaml(dump_recipe(recipe), "x"), "x") == recipe
    assert validate_recipe(recipe) == recipe


def test_a_recipe_without_sources_has_one() -> None:
    recipe = recipe_from_mapping(mapping({"records": ["a", "b"], "images": "c", "split": "dev"}), "r.yaml")
    assert sources_of(recipe.stages[0].data) == (DataSource(records=("a", "b"), images="c", split="dev"),)
    assert paths_of("a") == ("a",)
    assert recipe_from_mapping(parse_yaml(dump_recipe(recipe), "x"), "x") == recipe


SOURCE = {"records": "a.json"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "stages.0.data.records: missing; add a line 'records: ...'"),
        ({"sources": []}, "stages.0.data.records: missing; add a line 'records: ...'"),
        ({"records": None}, "stages.0.data.records: missing; add a line 'records: ...'"),
        (
            {"records": "a", "sources": [SOURCE]},
            "stages.0.data.sources: set together with records; keep one of the two",
        ),
        (
            {"split": "dev", "sources": [SOURCE]},
            "stages.0.data.split: set together with sources; set it in each source",
        ),
        (
            {"sources": [{**SOURCE, "weight": 0}]},
            "stages.0.data.sources.0.weight: expected a number above 0, got 0; use the default, 1.0, or another",
        ),
        (
            {"sources": [{**SOURCE, "weight": -1}]},
            "stages.0.data.sources.0.weight: expected a number above 0, got -1; use the default, 1.0, or another",
        ),
        ({"sources": [SOURCE, {**SOURCE, "weight": float("nan")}]}, "stages.0.data.sources.1.weight: "),
        ({"sources": [SOURCE, {**SOURCE, "weight": float("inf")}]}, "stages.0.data.sources.1.weight: "),
        ({"sources": [{**SOURCE, "weight": "much"}]}, "stages.0.data.sources.0.weight: expected a number, got 'much'"),
        ({"sources": [{**SOURCE, "weight": 1e6}]}, "stages.0.data.sources.0.weight: 1e+06 would take each record"),
        (
            {"sources": [{"record": "a"}]},
            "stages.0.data.sources.0.record: unknown field; did you mean 'records'?",
        ),
        ({"sources": [{"images": "a"}]}, "stages.0.data.sources.0.records: missing; add a line 'records: ...'"),
        (
            {"columns": {"answer": "a"}, "sources": [SOURCE]},
            "stages.0.data.columns: set together with sources; set it in each source",
        ),
        (
            {"sources": [{**SOURCE, "columns": {"questions": "a"}}]},
            "stages.0.data.sources.0.columns.questions: unknown field; did you mean 'question'?",
        ),
        ({"sources": ["a.json"]}, "stages.0.data.sources.0: expected a mapping of fields, got 'a.json'"),
        ({"sources": "a.json"}, "stages.0.data.sources: expected a list, got 'a.json'"),
        ({"sources": [{**SOURCE, "streaming": "yes"}]}, "stages.0.data.sources.0.streaming: expected true or false"),
        ({"records": "a", "split": ""}, "stages.0.data.split: expected a non-blank string"),
        ({"records": "a", "trust_remote_code": True}, "stages.0.data.trust_remote_code: unknown field"),
    ],
)
def test_a_fault_of_the_sources_is_one_line(data: dict[str, Any], expected: str) -> None:
    (line,) = problems(mapping(data))
    assert line.startswith(expected)


def test_a_source_is_changed_by_an_override(tmp_path: Any) -> None:
    recipe = recipe_from_mapping(mapping({"sources": [SOURCE, SOURCE]}), "r.yaml")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    changed: Recipe = load_recipe(tmp_path / "r.yaml", overrides=["stages.0.data.sources.1.weight=0.5"])
    assert [source.weight for source in changed.stages[0].data.sources] == [1.0, 0.5]
    with pytest.raises(ConfigError, match=r"sources\.2.*no entry 2"):
        load_recipe(tmp_path / "r.yaml", overrides=["stages.0.data.sources.2.weight=0.5"])


def test_the_size_of_an_epoch() -> None:
    plain = DataConfig(records=("a", "b"))
    assert size_of_epoch((30, 10), 4, plain) == 36
    weighted = DataConfig(sources=(DataSource(records="a", weight=0.5), DataSource(records="b", weight=3.0)))
    assert size_of_epoch((30, 10), 0, weighted) == 15 + 30
    assert size_of_epoch((30, 10), 4, weighted) == round(13.5) + 27
    assert size_of_epoch((30, 0), 0, weighted) == 15
