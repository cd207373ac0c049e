"""The recommended resolution is the cheapest one at which the text can be read."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llavar_peft.data.image_views import ImageViews
from llavar_peft.data.record_texts import RecordText
from llavar_peft.models.compare_resolutions import ResolutionReport, compare_resolutions
from llavar_peft.recipe.resolution import CrossAttention, Tiles, resolution_from

PLAIN = ImageViews.of_model(336, "pad")
SIZES = st.tuples(st.integers(50, 4000), st.integers(50, 4000))


def a_text(size: tuple[int, int], *heights: float, tokens: int = 50) -> RecordText:
    return RecordText((size,), tuple((0, height, 1 / len(heights)) for height in heights), tokens)


def compared(*texts: RecordText, views: ImageViews = PLAIN, **settings: Any) -> ResolutionReport:
    report = compare_resolutions(texts, views, **settings)
    assert report is not None
    return report


@hypothesis_settings(max_examples=40)
@given(st.lists(st.builds(a_text, SIZES, st.floats(2, 80)), min_size=1, max_size=5))
def test_nothing_cheaper_suffices(texts: list[RecordText]) -> None:
    report = compared(*texts)
    first = report.recommended[0]
    enough = [one for one in report.settings if one.share_below <= 0.05]
    assert len(report.settings) == 14
    if not enough:
        assert not report.reached
        assert first.share_below == min(one.share_below for one in report.settings)
        return
    assert report.reached
    assert all(one in enough for one in report.recommended)
    if report.settings[0] in enough:
        assert report.recommended == report.settings[:1]  # nothing has to be changed
    else:
        assert first.cost == min(one.cost for one in enough)
        assert [one.cost for one in report.recommended] == sorted(one.cost for one in report.recommended)


def test_shares_and_costs_are_those_of_the_geometry() -> None:
    """A page of 1344 x 1344 pixels: a letter of 20 pixels has 5 in the whole image, and 10 in 2 x 2 tiles."""
    report = compared(*[a_text((1344, 1344), 20)] * 3, a_text((1344, 1344), 40))
    found = {one.name: one for one in report.settings}
    plain, tiles, crops = found["plain"], found["tiles, at most 4"], found["cross-attention, grid 2"]
    assert (plain.share_below, plain.median_height, plain.image_tokens, plain.tower_images) == (0.75, 5, 576, 1)
    assert (tiles.share_below, tiles.median_height, tiles.image_tokens, tiles.tower_images) == (0, 10, 2928, 5)
    assert (crops.share_below, crops.median_height, crops.image_tokens, crops.tower_images) == (0, 10, 576, 5)
    pooled = found["tiles, at most 4, pooled"]
    assert (pooled.share_below, pooled.median_height, pooled.image_tokens) == (0, 10, 744)
    assert [one.recipe for one in report.recommended] == [
        "resolution: {type: cross_attention, grid: 2}",
        "resolution: {type: tiles, max_tiles: 4, pool: 2}",
        "resolution: {type: tiles, max_tiles: 4}",
    ]
    assert tiles.longest >= 2928 + 50


def test_each_record_counts_as_one() -> None:
    """Nine lines of small print on one page weigh as much as the one line of another."""
    report = compared(a_text((336, 336), 20, *[4] * 9), a_text((336, 336), 20))
    assert report.settings[0].share_below == pytest.approx(0.45)
    assert report.own_below == pytest.approx(0.45)


def test_exactly_95_percent_is_enough() -> None:
    texts = [a_text((336, 336), 20)] * 19
    assert compared(*texts, a_text((336, 336), 4)).recommended[0].resolution is None
    assert compared(*texts[1:], a_text((336, 336), 4)).recommended[0].resolution is not None


def test_the_line_of_the_recipe_is_the_resolution() -> None:
    for one in compared(a_text((900, 900), 3)).settings:
        line = yaml.safe_load(one.recipe)
        assert resolution_from(line["resolution"], "recipe") == one.resolution
        assert one.as_dict()["resolution"] == line["resolution"]


def test_only_what_the_model_can_be_given_is_compared() -> None:
    small = a_text((1344, 1344), 20)
    tiled = compared(small, own=Tiles(grid=((1, 2), (2, 1))), max_length=2048)
    assert all(isinstance(one.resolution, Tiles) for one in tiled.settings)
    assert tiled.current is not None
    assert tiled.current.as_dict()["resolution"] == {"type": "tiles", "grid": [[1, 2], [2, 1]]}
    crossed = compared(small, own=CrossAttention(grid=2), max_length=2048)
    assert all(isinstance(one.resolution, CrossAttention) for one in crossed.settings)


def test_a_resolution_replaces_the_mode_that_keeps_shapes() -> None:
    wide = a_text((1344, 672), 20)
    kept, padded = (compared(wide, views=ImageViews.of_model(336, mode)).settings for mode in ("keep", "pad"))
    assert (kept[0].median_height, kept[0].image_tokens) == (6.67, 512)
    assert kept[1:] == padded[1:]


def test_max_length_limits_the_tiles_of_the_model() -> None:
    from llavar_peft.models.compare_resolutions import _views_with

    views = _views_with(PLAIN, Tiles(max_tiles=4))
    wide, narrow = (compared(a_text((1344, 1344), 20), views=views, own=Tiles(), max_length=n) for n in (4096, 1500))
    assert wide.current is not None
    assert narrow.current is not None
    assert (wide.current.share_below, narrow.current.share_below) == (0, 1)
    assert narrow.current.image_tokens <= 1450


def test_nothing_is_said_of_unknown_text() -> None:
    assert compare_resolutions([], PLAIN) is None
