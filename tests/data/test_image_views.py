"""What a model is said to see of an image is what the prepared pixels show, for images of any shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, Pix2StructImageProcessor

from llavar_peft.data.image_views import ImageViews
from llavar_peft.data.prepared_images import PreparedImage
from llavar_peft.data.tile_layout import TileGeometry
from llavar_peft.recipe.resolution import Tiles
from llavar_peft.types import ImageMode

SIDE, PATCH = 56, 14
CLIP = CLIPImageProcessorPil(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)
SIGLIP = CLIPImageProcessorPil(
    size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
)
SHAPES = [(56, 56), (57, 55), (400, 300), (300, 400), (4000, 300), (300, 4000), (90, 1200), (30, 20), (1000, 999)]


def a_processor(tiles: Tiles | None = None, grid: int | None = None, images: Any = CLIP, detail: Any = None) -> Any:
    geometry = None if tiles is None else TileGeometry(tiles.grids, SIDE, PATCH, tiles.pool, tiles.max_image_tokens)
    return SimpleNamespace(
        image_processor=images, patch_size=PATCH, image_side=SIDE, tile_geometry=geometry, detail_grid=grid,
        detail_processor=detail,
    )  # fmt: skip


def square_on(size: tuple[int, int]) -> tuple[Image.Image, int]:
    """Return a black image with a red square in its centre, and the length of the square's sides."""
    image, length = Image.new("RGB", size), max(2, min(size) // 2)
    image.paste((255, 0, 0), tuple((side - length) // 2 + end for end in (0, length) for side in size))
    return image, length


def lower_side(pixels_3HW: Tensor) -> int:
    """Return the shorter extent of what is red, which neither the image nor its padding is."""
    red_HW = pixels_3HW[0] - pixels_3HW[1] > 1
    return min(int(red_HW.any(0).sum()), int(red_HW.any(1).sum()))


def joined(views: Tensor, rows: int, columns: int) -> Tensor:
    grid = views.reshape(rows, columns, *views.shape[1:])
    return torch.cat([torch.cat(list(row), dim=2) for row in grid], dim=1)


def largest(prepared: PreparedImage) -> int:
    """Return the height of the square in the view that shows it largest."""
    if prepared.layout is not None:
        rows, columns = prepared.layout[:2]
        return max(lower_side(prepared.pixels[0]), lower_side(joined(prepared.pixels[1:], rows, columns)))
    if prepared.detail is not None and prepared.detail.ndim == 3:
        return max(lower_side(prepared.pixels), lower_side(prepared.detail))
    if prepared.detail is not None:
        grid = round(len(prepared.detail) ** 0.5)
        return max(lower_side(prepared.pixels), lower_side(joined(prepared.detail, grid, grid)))
    return lower_side(prepared.pixels)


def check(size: tuple[int, int], mode: ImageMode, processor: Any) -> None:
    image, length = square_on(size)
    prepared = PreparedImage.prepare(image, mode, processor)
    (seen,) = ImageViews.of_model(processor, mode).seen([size])
    crops = 0 if prepared.detail is None else 1 if prepared.detail.ndim == 3 else len(prepared.detail)
    assert seen.tokens == prepared.tokens
    assert seen.views == (len(prepared.pixels) if prepared.layout else 1 + crops)
    # A side is rounded to whole pixels, twice where the image is resized before it is padded.
    assert abs(largest(prepared) - length * seen.scale) <= 2, (size, mode)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("mode", ["pad", "square", "keep", "pad_black"])
def test_the_whole_image(size: tuple[int, int], mode: ImageMode) -> None:
    check(size, mode, a_processor())


def test_a_squashed_image_counts_by_the_direction_that_is_scaled_more() -> None:
    for size in ((400, 100), (100, 400), (300, 290)):
        check(size, "square", a_processor(images=SIGLIP))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("tiles", [Tiles(max_tiles=2), Tiles(max_tiles=9, pool=2), Tiles(grid=(2, 3))], ids=str)
def test_tiles(size: tuple[int, int], tiles: Tiles) -> None:
    check(size, "pad", a_processor(tiles))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("grid", "mode"), [(2, "pad"), (3, "pad_black"), (4, "square")])
def test_crops(size: tuple[int, int], grid: int, mode: ImageMode) -> None:
    check(size, mode, a_processor(grid=grid))


@pytest.mark.parametrize("size", SHAPES)
def test_an_encoder_of_its_own(size: tuple[int, int]) -> None:
    larger = CLIPImageProcessorPil(
        size={"shortest_edge": 3 * SIDE}, crop_size=3 * SIDE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    check(size, "pad", a_processor(detail=larger))
    pix2struct = Pix2StructImageProcessor(max_patches=200)
    processor = a_processor(detail=pix2struct)
    patches = PreparedImage.prepare(Image.new("RGB", size), "pad", processor).detail
    assert patches is not None
    rows, columns = (int(patches[:, place].max()) for place in (0, 1))
    (seen,) = ImageViews.of_model(processor, "pad").seen([size])
    whole = min(SIDE / side for side in size)
    assert seen.scale == pytest.approx(max(whole, min(16 * rows / size[1], 16 * columns / size[0])))


@hypothesis_settings(max_examples=60)
@given(st.integers(8, 900), st.integers(8, 900), st.integers(0, 16), st.sampled_from(["pad", "square", "pad_black"]))
def test_any_shape(width: int, height: int, most: int, mode: ImageMode) -> None:
    check((width, height), mode, a_processor(Tiles(max_tiles=most) if most else None))


def test_images_of_a_record_share_its_tokens() -> None:
    processor = a_processor(Tiles(max_tiles=9, max_image_tokens=200))
    views, sizes = ImageViews.of_model(processor, "pad"), [(500, 400), (800, 200), (100, 900)]
    for budget in (None, 150, 80, -20):
        layouts = processor.tile_geometry.layouts(sizes, None if budget is None else max(0, budget))
        assert [one.tokens for one in views.seen(sizes, budget)] == list(map(processor.tile_geometry.tokens, layouts))
    alone, shared = views.seen(sizes[:1])[0], views.seen(sizes, 150)[0]
    assert alone.scale > shared.scale


def test_the_released_tower_is_known_without_its_files() -> None:
    (seen,) = ImageViews.of_model(336, "pad").seen([(1000, 500)])
    assert (seen.scale, seen.tokens, seen.views) == (pytest.approx(0.336), 576, 1)
