"""How an image is cut into tiles, and how many image tokens it gets.

An image is first resized into one of several grids of tiles and padded to it. The model sees the whole image at the
tower's size, then the tiles, of whose patches those that show only padding are left out.

Source: LLaVA-NeXT (January 2024), as in ``transformers.LlavaNextForConditionalGeneration``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llavar_peft.types import TileLayout


@dataclass(frozen=True, slots=True)
class TileGeometry:
    """The sizes that decide how images are cut.

    Attributes:
        grids: The grids that can be chosen, as (rows, columns).
        side: Side of a tile in pixels: that of the tower's images.
        patch: Side of a patch in pixels.
        pool: Number of neighbouring patches, in each direction, that are averaged.
        budget: Maximum number of image tokens of a record; None for no limit.
    """

    grids: tuple[tuple[int, int], ...]
    side: int
    patch: int
    pool: int = 1
    budget: int | None = None

    @property
    def patches(self) -> int:
        """Number of rows, and of columns, of a tile's patches after pooling."""
        return math.ceil(self.side // self.patch / self.pool)

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens that an image can have."""
        whole = ((rows * self.patches, columns * self.patches) for rows, columns in self.grids)
        return self.patches**2 + max(rows * (columns + 1) for rows, columns in whole)

    @property
    def least_tokens(self) -> int:
        """The number of tokens of an image that fills the smallest grid."""
        whole = ((rows * self.patches, columns * self.patches) for rows, columns in self.grids)
        return self.patches**2 + min(rows * (columns + 1) for rows, columns in whole)

    def layout(self, size: tuple[int, int], budget: int | None = None) -> TileLayout:
        """Choose the grid of an image: the one that keeps most of its pixels and, of several, wastes the least.

        Args:
            size: (width, height) of the image in pixels.
            budget: Maximum number of image tokens. If no grid fits, the image gets the one with the fewest tokens.
        """
        from transformers.image_processing_utils import select_best_resolution

        layouts = {grid: self._layout_in(grid, size) for grid in self.grids}
        if budget is not None:
            fewest = min(map(self.tokens, layouts.values()))
            layouts = {grid: one for grid, one in layouts.items() if self.tokens(one) <= max(budget, fewest)}
        pixels = [(rows * self.side, columns * self.side) for rows, columns in layouts]
        height, width = select_best_resolution(size[::-1], pixels)
        return layouts[height // self.side, width // self.side]

    def _layout_in(self, grid: tuple[int, int], size: tuple[int, int]) -> TileLayout:
        """Return the layout of an image in a grid: the padding of half a patch or more is left out on both sides."""
        (width, height), (rows, columns) = size, (side * self.patches for side in grid)
        # The quotients are LLaVA-NeXT's, whose rounding decides in close cases.
        if width / height > columns / rows:
            kept = int(round(height * (columns / width), 7))
            return (*grid, rows - (rows - kept) // 2 * 2, columns)
        kept = int(round(width * (rows / height), 7))
        return (*grid, rows, columns - (columns - kept) // 2 * 2)

    def tokens(self, layout: TileLayout) -> int:
        """Return the number of image tokens: the whole image's, the tiles', and one at the end of each row."""
        _, _, rows, columns = layout
        return self.patches**2 + rows * (columns + 1)

    def resized(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) of an image in a grid, in pixels, without the padding."""
        (width, height), (most_height, most_width) = size, (side * self.side for side in grid)
        across, down = most_width / width, most_height / height
        if across < down:
            return most_width, min(math.ceil(height * across), most_height)
        return min(math.ceil(width * down), most_width), most_height

    def layouts(self, sizes: Sequence[tuple[int, int]], budget: int | None = None) -> list[TileLayout]:
        """Choose the grids of a record's images, which share its image tokens.

        Args:
            sizes: (width, height) of each image in pixels.
            budget: Maximum number of image tokens, in addition to the geometry's own; None for no other limit.
        """
        limits = [limit for limit in (self.budget, budget) if limit is not None]
        left, chosen = min(limits, default=None), list[TileLayout]()
        for number, size in enumerate(sizes):
            # What an image does not use is left for those after it.
            share = None if left is None else left // (len(sizes) - number)
            chosen.append(self.layout(size, share))
            left = None if left is None else left - self.tokens(chosen[-1])
        return chosen


def view_count(layout: TileLayout) -> int:
    """Return the number of images that the tower gets for an image: the whole, and its tiles."""
    return 1 + layout[0] * layout[1]
