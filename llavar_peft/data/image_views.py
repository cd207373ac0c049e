"""How large an image's content is to a model, and what it costs: its image tokens and the vision tower's work.

No image is opened: the size of an image is enough. Estimates, and the comparison of resolutions, use this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llavar_peft.data.image_preparation import image_token_count, kept_size, prepared_scale
from llavar_peft.data.tile_layout import TileGeometry, view_count
from llavar_peft.types import ImageMode

RELEASED_SIDE: Final = 336
"""Side of the released tower's input in pixels, where no model is given. Its patches have 14."""


@dataclass(frozen=True, slots=True)
class SeenImage:
    """An image as a model sees it.

    Attributes:
        scale: Factor from a length in the image to the same in the view that shows it largest. If a view stretches the
            image, it is the smaller of the factors of height and width, because it is letters that have to be read.
        tokens: Number of image tokens.
        views: Number of images that the vision tower gets for it.
    """

    scale: float
    tokens: int
    views: int


@dataclass(frozen=True, slots=True)
class ImageViews:
    """The views of an image that a model sees: the whole image, and its tiles or the crops of an enlarged image.

    Attributes:
        mode: How the whole image is prepared.
        processor: As for ``prepared_scale``: a processor, or the side of the tower's input in pixels.
        patch: Side of a patch in pixels.
        tiles: How images are cut into tiles; None without tiles.
        grid: Rows, and columns, of the crops; None without crops.
        detail: The image processor of the cross-attention's own encoder; None without one.
    """

    mode: ImageMode
    processor: Any
    patch: int = 14
    tiles: TileGeometry | None = None
    grid: int | None = None
    detail: Any = None

    @classmethod
    def of_model(cls, processor: Any, mode: ImageMode) -> ImageViews:
        """Return the views of a model.

        Args:
            processor: The model's processor, or the side of the released tower's input in pixels.
            mode: How the whole image is prepared.
        """
        if isinstance(processor, int):
            return cls(mode, processor)
        return cls(
            mode, processor, processor.patch_size, processor.tile_geometry, processor.detail_grid,
            processor.detail_processor,
        )  # fmt: skip

    @property
    def side(self) -> int:
        """Side of the tower's input in pixels."""
        return self.processor if isinstance(self.processor, int) else int(self.processor.image_side)

    def seen(self, sizes: Sequence[tuple[int, int]], budget: int | None = None) -> list[SeenImage]:
        """Return how the images of a record are seen.

        Args:
            sizes: (width, height) of each image in pixels.
            budget: Maximum number of image tokens of the record, which limits tiles; None for the model's own.
        """
        if self.tiles is None:
            return [self._seen_whole(size) for size in sizes]
        layouts = self.tiles.layouts(sizes, None if budget is None else max(0, budget))
        seen = []
        for size, layout in zip(sizes, layouts, strict=True):
            # The view of the whole image shows no detail larger: in one direction at least, it is scaled more.
            width, height = self.tiles.resized(size, layout[:2])
            scale = min(width / size[0], height / size[1])
            seen.append(SeenImage(scale, self.tiles.tokens(layout), view_count(layout)))
        return seen

    def _seen_whole(self, size: tuple[int, int]) -> SeenImage:
        width, height = kept_size(size, self.patch) if self.mode == "keep" else (self.side, self.side)
        tokens = image_token_count((height, width), self.patch)
        grid = self.grid or 0
        scale = self._scale(size, self.processor) * (grid or 1)
        if self.detail is None:
            return SeenImage(scale, tokens, 1 + grid * grid)
        takes_patches = "flattened_patches" in self.detail.model_input_names
        detail_scale = _flattened_scale(size, self.detail) if takes_patches else self._scale(size, self.detail)
        return SeenImage(max(scale, detail_scale), tokens, 2)

    def _scale(self, size: tuple[int, int], processor: Any) -> float:
        """Return the smaller of the factors of height and width."""
        return min(prepared_scale(sides, self.mode, processor) for sides in (size, size[::-1]))


def _flattened_scale(size: tuple[int, int], processor: Any) -> float:
    """Return the factor of Pix2Struct, which resizes an image to as many whole patches as are allowed."""
    patch = processor.patch_size["height"], processor.patch_size["width"]
    lengths = size[::-1]
    scale = math.sqrt(processor.max_patches * math.prod(patch) / math.prod(lengths))
    counts = [
        max(1, min(math.floor(scale * length / side), processor.max_patches))
        for length, side in zip(lengths, patch, strict=True)
    ]
    return min(float(count * side / length) for count, side, length in zip(counts, patch, lengths, strict=True))
