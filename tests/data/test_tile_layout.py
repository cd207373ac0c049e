"""How images are cut into tiles: as many tokens as features, within the budget, for any size and any grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llavar_peft.data.image_preparation import prepare_tiles
from llavar_peft.data.tile_layout import TileGeometry, view_count
from llavar_peft.models.tile_features import arrange_tiles, pool_patches
from llavar_peft.recipe.resolution import Tiles, describe_resolution, resolution_from

SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
GRIDS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5, unique=True).map(tuple)
GEOMETRIES = st.builds(
    lambda grids, patch, patches, rest, pool: TileGeometry(grids, patch * patches + rest, patch, pool),
    grids=GRIDS, patch=st.integers(2, 5), patches=st.integers(1, 5), rest=st.integers(0, 1),
    pool=st.sampled_from([1, 2]),
)  # fmt: skip


@settings(max_examples=80)
@given(geometry=GEOMETRIES, sizes=st.lists(SIZES, min_size=1, max_size=3))
def test_an_image_has_as_many_tokens_as_features(geometry: TileGeometry, sizes: list[tuple[int, int]]) -> None:
    layouts = geometry.layouts(sizes)
    views, side = sum(map(view_count, layouts)), geometry.side // geometry.patch
    pooled = pool_patches(torch.randn(views, side * side, 2), geometry.pool)
    features = arrange_tiles(pooled, layouts, torch.randn(2))
    assert [len(one) for one in features] == [geometry.tokens(layout) for layout in layouts]
    assert all(layout[:2] in geometry.grids for layout in layouts)
    assert max(map(len, features)) <= geometry.most_tokens


@settings(max_examples=80)
@given(geometry=GEOMETRIES, size=SIZES)
def test_an_image_fills_one_side_of_its_grid_and_exceeds_none(geometry: TileGeometry, size: tuple[int, int]) -> None:
    rows, columns, kept_rows, kept_columns = geometry.layout(size)
    width, height = geometry.resized(size, (rows, columns))
    assert 1 <= width <= columns * geometry.side
    assert 1 <= height <= rows * geometry.side
    assert width == columns * geometry.side or height == rows * geometry.side
    # No row that shows a part of the image is left out, except for less than a patch on each side.
    visible = height / geometry.side * geometry.patches, width / geometry.side * geometry.patches
    for kept, shown in zip((kept_rows, kept_columns), visible, strict=True):
        assert shown - 2 < kept <= max(rows, columns) * geometry.patches


def _detail(geometry: TileGeometry, size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Return the number of pixels that show an image, by which LLaVA-NeXT chooses the grid."""
    (width, height), (rows, columns) = size, grid
    scale = min(columns * geometry.side / width, rows * geometry.side / height)
    return min(int(width * scale) * int(height * scale), width * height)


@settings(max_examples=100)
@given(geometry=GEOMETRIES, size=SIZES, budget=st.integers(0, 800), more=st.integers(0, 400))
def test_a_budget_is_kept_where_a_grid_fits_and_a_larger_one_never_loses_detail(
    geometry: TileGeometry, size: tuple[int, int], budget: int, more: int
) -> None:
    all_tokens = [geometry.tokens(geometry._layout_in(grid, size)) for grid in geometry.grids]
    chosen = geometry.layout(size, budget)
    tokens = geometry.tokens(chosen)
    assert tokens <= budget if min(all_tokens) <= budget else tokens == min(all_tokens)
    larger = geometry.layout(size, budget + more)
    assert _detail(geometry, size, larger[:2]) >= _detail(geometry, size, chosen[:2])
    assert geometry.layout(size, max(all_tokens)) == geometry.layout(size)


@settings(max_examples=100)
@given(geometry=GEOMETRIES, sizes=st.lists(SIZES, min_size=1, max_size=4), share=st.integers(1, 500))
def test_the_images_of_a_record_share_the_budget(
    geometry: TileGeometry, sizes: list[tuple[int, int]], share: int
) -> None:
    layouts = geometry.layouts(sizes, share * len(sizes))
    fewest = [min(geometry.tokens(geometry._layout_in(grid, size)) for grid in geometry.grids) for size in sizes]
    if max(fewest) <= share:
        assert sum(map(geometry.tokens, layouts)) <= share * len(sizes)
    else:
        assert sum(map(geometry.tokens, layouts)) <= sum(max(share, least) for least in fewest)


def test_what_an_image_leaves_is_for_those_after_it() -> None:
    size = (112, 112)
    for budget, grids in ((88 + 88, [(2, 2), (2, 2)]), (88 + 36, [(1, 1), (2, 2)]), (87 + 36, [(1, 1), (1, 1)])):
        geometry = TileGeometry(((1, 1), (2, 2)), 56, 14, budget=budget)
        assert [layout[:2] for layout in geometry.layouts([size, size])] == grids


def test_tiles_show_the_image_where_the_layout_says() -> None:
    """A red image: every row and column of kept patches shows red, and what is left out is black."""

    class _Processor:
        tile_geometry = TileGeometry(((2, 3),), 56, 14)

    from transformers import CLIPImageProcessorPil

    processor = _Processor()
    processor.image_processor = CLIPImageProcessorPil(  # type: ignore[attr-defined]
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_mean=[0, 0, 0], image_std=[1, 1, 1]
    )
    views = prepare_tiles(Image.new("RGB", (56, 56), "red"), None, processor)  # type: ignore[arg-type]
    whole, tiles = views[0], views[1:].view(2, 3, 3, 56, 56)
    assert bool((whole[0] == 1).all())
    page = tiles.permute(2, 0, 3, 1, 4).reshape(3, 112, 168)
    assert bool((page[0, :, 28:140] == 1).all())
    assert not page[0, :, :28].any()
    assert not page[0, :, 140:].any()
    assert processor.tile_geometry.layout((56, 56)) == (2, 3, 8, 8)


@pytest.mark.parametrize("pool", [1, 2])
def test_grids_are_saved_as_they_are_chosen(pool: int) -> None:
    tiles = Tiles(max_tiles=3, pool=pool)  # type: ignore[arg-type]
    assert tiles.grids == ((1, 1), (1, 2), (1, 3), (2, 1), (3, 1))
    again = resolution_from(describe_resolution(tiles), "here")
    assert isinstance(again, Tiles)
    assert (again.grids, again.pool) == (tiles.grids, pool)
    assert Tiles(grid=(2, 2)).grids == ((2, 2),)  # type: ignore[arg-type]
