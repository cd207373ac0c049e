"""``model.resolution``: its forms in YAML and Python, and what is rejected."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llavar_peft import CrossAttention, Tiles
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.resolution import describe_resolution, resolution_from
from llavar_peft.recipe.schema import Recipe
from llavar_peft.recipe.validate import recipe_from_mapping, recipe_to_mapping, validate_recipe


def with_resolution(value: str) -> Recipe:
    return load_recipe("llavar-7b", overrides=[f"model.resolution{value}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=null", None),
        ("=tiles", Tiles()),
        ("=cross_attention", CrossAttention()),
        (".max_tiles=9", Tiles(max_tiles=9)),
        ("={type: tiles, grid: [2, 2]}", Tiles(grid=((2, 2),))),
        ("={type: tiles, grid: [[1, 2], [3, 1]], pool: 2}", Tiles(grid=((1, 2), (3, 1)), pool=2)),
        ("={type: cross_attention, grid: 2, encoder: some/folder}", CrossAttention(grid=2, encoder="some/folder")),
    ],
)
def test_yaml_and_python_write_the_same_value(text: str, expected: Tiles | CrossAttention | None) -> None:
    recipe = with_resolution(text)
    assert recipe.model.resolution == expected
    assert recipe_from_mapping(recipe_to_mapping(recipe), "again") == recipe


def test_the_whole_recipe_as_yaml_reads_back(tmp_path: Any) -> None:
    recipe = with_resolution("={type: tiles, grid: [[1, 2], [3, 1]], max_image_tokens: 2000}")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_python_accepts_the_short_form_of_a_grid() -> None:
    assert Tiles(grid=(2, 2)).grids == ((2, 2),)  # type: ignore[arg-type]
    recipe = with_resolution("=null")
    model = dataclasses.replace(recipe.model, resolution=Tiles(grid=(2, 2)))  # type: ignore[arg-type]
    assert validate_recipe(dataclasses.replace(recipe, model=model)).model.resolution == Tiles(grid=((2, 2),))


@pytest.mark.parametrize("tiles", [1, 2, 4, 9, 64])
def test_all_grids_up_to_a_number_of_tiles_can_be_chosen(tiles: int) -> None:
    grids = Tiles(max_tiles=tiles).grids
    assert set(grids) == {
        (rows, columns) for rows in range(1, 65) for columns in range(1, 65) if rows * columns <= tiles
    }
    assert len(set(grids)) == len(grids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=tile", "did you mean 'tiles'"),
        ("=4", "expected one of tiles, cross_attention, got 4"),
        (".max_tile=4", "did you mean 'max_tiles'"),
        (".max_tiles=0", "from 1 to 64, got 0"),
        (".pool=3", "expected one of 1, 2, got 3"),
        (".grid=[0, 2]", "expected (rows, columns) with at most 64 tiles"),
        (".grid=[[1, 2, 3]]", "expected (rows, columns) with at most 64 tiles"),
        (".grid=[[9, 9]]", "expected (rows, columns) with at most 64 tiles"),
        (".grid=[true, 1]", "expected (rows, columns) with at most 64 tiles"),
        (".grid=wide", "write for example [2, 2]"),
        (".max_image_tokens=0", "of 1 or more, got 0"),
        ("={type: cross_attention, grid: 0}", "from 1 to 8, got 0"),
        (".grid=[[9, 9]]", "got [[9, 9]]"),
        (".pool=true", "expected 1 or 2, got true"),
        (".pool=1.0", "expected 1 or 2, got 1.0"),
        ("={type: cross_attention, max_tiles: 2}", "unknown field; only resolution: tiles has it"),
        (".encoder=concat_clip", "unknown field; only resolution: cross_attention has it"),
    ],
)
def test_other_values_are_named_with_their_path(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        with_resolution(text)
    assert "model.resolution" in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("resolution", [None, Tiles(max_tiles=6, pool=2), CrossAttention(grid=3)])
def test_a_saved_resolution_reads_back(resolution: Tiles | CrossAttention | None) -> None:
    saved = describe_resolution(resolution)
    again = resolution_from(saved, "config.json")
    assert describe_resolution(again) == saved
    if isinstance(resolution, Tiles) and isinstance(again, Tiles):
        assert again.grids == resolution.grids


@pytest.mark.parametrize("damaged", [{}, [], "tiles", {"type": "tiles", "pool": 7}, {"type": "mosaic"}, {"type": None}])
def test_a_damaged_resolution_is_named(damaged: object) -> None:
    with pytest.raises(ConfigError, match=r"^config.json:resolution: not readable as tiles or cross-attention"):
        resolution_from(damaged, "config.json:resolution")
