"""Which resolution a model needs for the text of some records: how much of it is too small, and what each one costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from llavar_peft.data.image_views import ImageViews
from llavar_peft.data.record_texts import RecordText, Size
from llavar_peft.data.text_size import SMALLEST_LETTERS
from llavar_peft.data.tile_layout import TileGeometry
from llavar_peft.recipe.resolution import CrossAttention, Tiles
from llavar_peft.types import ImageMode, ReadableRepr

ENOUGH: Final = 0.95
"""Share of the text that has to be high enough."""

_TILES: Final = (2, 4, 6, 9, 16)
_GRIDS: Final = (2, 3, 4)
_TEMPLATE_TOKENS: Final = 128  # of the system prompt and the roles, which an estimate of a record does not count
_ROUNDED: Final = 64


@dataclass(frozen=True, slots=True, repr=False)
class ResolutionFigures(ReadableRepr):
    """How large the text is at a resolution, and the resolution's cost.

    Attributes:
        resolution: ``ModelConfig.resolution``; None is the whole image only.
        share_below: Share of the text that is lower than ``ResolutionReport.smallest`` in the vision tower's input,
            from 0 to 1; each record counts as one. Whether patches are pooled does not change what the tower sees.
        median_height: Median height of the letters, in pixels of the vision tower's input.
        image_tokens: Mean number of image tokens of a record.
        tower_images: Mean number of images that the vision tower gets for a record.
        longest: Estimated number of tokens of the longest record.
    """

    resolution: Tiles | CrossAttention | None
    share_below: float
    median_height: float
    image_tokens: float
    tower_images: float
    longest: int

    @property
    def name(self) -> str:
        """The resolution in words."""
        if isinstance(self.resolution, Tiles):
            # Those of a model have their grids written out.
            most = max(rows * columns for rows, columns in self.resolution.grids)
            return f"tiles, at most {most}{', pooled' if self.resolution.pool > 1 else ''}"
        return "plain" if self.resolution is None else f"cross-attention, grid {self.resolution.grid}"

    @property
    def recipe(self) -> str:
        """The line of YAML under ``model`` that selects the resolution."""
        if self.resolution is None:
            return "resolution: null"
        written = ", ".join(f"{key}: {value}" for key, value in _settings(self.resolution).items())
        return f"resolution: {{{written}}}"

    @property
    def cost(self) -> tuple[float, float]:
        """What resolutions are ordered by: image tokens, then images for the vision tower."""
        return self.image_tokens, self.tower_images

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data for JSON."""
        settings = None if self.resolution is None else _settings(self.resolution)
        return {"name": self.name, **asdict(self), "resolution": settings, "recipe": self.recipe}


@dataclass(frozen=True, slots=True, repr=False)
class ResolutionReport(ReadableRepr):
    """The text of some records at several resolutions.

    Attributes:
        records: Number of records whose text is known.
        drawn: Number of records with images that were examined.
        side: Side of the tower's input in pixels.
        smallest: Height in pixels of the tower's input from which letters can be read.
        own_below: Share of the text that is below this height in the images themselves.
        current: The model as it is; None without a model.
        settings: The resolutions, those that change less and cost less first.
    """

    records: int
    drawn: int
    side: int
    smallest: float
    own_below: float
    current: ResolutionFigures | None
    settings: tuple[ResolutionFigures, ...]

    @property
    def reached(self) -> bool:
        """Whether a resolution brings enough of the text to the smallest height."""
        return any(map(_suffices, self.settings))

    @property
    def recommended(self) -> tuple[ResolutionFigures, ...]:
        """The cheapest resolution of each method that suffices, the cheapest of all first; the best one if none does.

        The methods are tiles, pooled tiles and cross-attention, whose costs differ in kind. If the whole image
        suffices, no other resolution is named.
        """
        if not self.settings:
            return ()
        if not self.reached:
            return (min(self.settings, key=lambda figures: (figures.share_below, figures.cost)),)
        cheapest: dict[tuple[type, int], ResolutionFigures] = {}
        for figures in self.settings:
            if _suffices(figures):
                if figures.resolution is None:
                    return (figures,)
                cheapest.setdefault((type(figures.resolution), _pool(figures.resolution)), figures)
        return tuple(cheapest.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("current", "settings")},
            "current": None if self.current is None else self.current.as_dict(),
            "settings": [figures.as_dict() for figures in self.settings],
            "reached": self.reached,
            "recommended": [figures.as_dict() for figures in self.recommended],
        }


def compare_resolutions(
    texts: Sequence[RecordText],
    views: ImageViews,
    *,
    own: Tiles | CrossAttention | None = None,
    max_length: int | None = None,
    smallest: float = SMALLEST_LETTERS,
    drawn: int | None = None,
) -> ResolutionReport | None:
    """Compare the resolutions that a model can have.

    Args:
        texts: The text of the records.
        views: The model's, or those of a model without a resolution.
        own: The model's resolution, of which only the settings can be changed; None if it has none.
        max_length: Tokens of a record in training, to which the tiles of the model as it is are limited; None if there
            is no model.
        smallest: Height in pixels of the tower's input from which letters can be read.
        drawn: Number of records that were examined.

    Returns:
        None if the text of no record is known.
    """
    if not texts:
        return None
    settings = [_measure(texts, _views_with(views, resolution), resolution, smallest) for resolution in _choices(own)]
    heights, shares = _weighted([height for text in texts for _, height, _ in text.lines], texts)
    return ResolutionReport(
        records=len(texts),
        drawn=len(texts) if drawn is None else drawn,
        side=views.side,
        smallest=smallest,
        own_below=float(shares[heights < smallest].sum()),
        current=None if max_length is None else _measure(texts, views, own, smallest, max_length),
        settings=tuple(sorted(settings, key=lambda figures: (figures.resolution is not None, figures.cost))),
    )


def _choices(own: Tiles | CrossAttention | None) -> list[Tiles | CrossAttention | None]:
    """Return the resolutions that a model can be given; its kind cannot be changed."""
    tiles = [Tiles(max_tiles=most, pool=pool) for most in _TILES for pool in (1, 2)]
    crops = [CrossAttention(grid=grid) for grid in _GRIDS]
    if own is None:
        return [None, *tiles, *crops]
    if isinstance(own, Tiles):
        return [*tiles]
    return [*crops] if own.encoder == CrossAttention.encoder else [own]


def _views_with(views: ImageViews, resolution: Tiles | CrossAttention | None) -> ImageViews:
    """Return how a model's images are prepared with another resolution."""
    mode: ImageMode = "pad" if views.mode == "keep" else views.mode  # which is for models without a resolution
    if isinstance(resolution, Tiles):
        geometry = TileGeometry(resolution.grids, views.side, views.patch, resolution.pool, resolution.max_image_tokens)
        return replace(views, mode=mode, tiles=geometry, grid=None)
    if resolution is None:
        return replace(views, tiles=None, grid=None)
    if resolution.encoder != CrossAttention.encoder:
        return views  # those of a model with an encoder of its own
    return replace(views, mode=mode, tiles=None, grid=resolution.grid)


def _measure(
    texts: Sequence[RecordText],
    views: ImageViews,
    resolution: Tiles | CrossAttention | None,
    smallest: float,
    max_length: int | None = None,
) -> ResolutionFigures:
    """Return the size of the text and the cost at one resolution.

    Args:
        texts: The text of the records.
        views: The images that the tower gets at this resolution.
        resolution: The resolution.
        smallest: Height in pixels of the tower's input from which letters can be read.
        max_length: Tokens of a record, to which tiles are limited; None for no limit.
    """
    views_of_sizes = {}  # many records have images of the same sizes
    scaled_heights: list[float] = []
    image_tokens: list[int] = []
    tower_images: list[int] = []
    longest = 0
    for text in texts:
        budget = None if max_length is None else max_length - text.other_tokens
        key: tuple[tuple[Size, ...], int | None] = (text.sizes, budget)
        if key not in views_of_sizes:
            views_of_sizes[key] = views.seen(text.sizes, budget)
        images = views_of_sizes[key]
        scaled_heights += [height * images[place].scale for place, height, _ in text.lines]
        image_tokens.append(sum(image.tokens for image in images))
        tower_images.append(sum(image.views for image in images))
        longest = max(longest, image_tokens[-1] + text.other_tokens + _TEMPLATE_TOKENS)
    heights, shares = _weighted(scaled_heights, texts)
    order = np.argsort(heights)
    middle = int(np.searchsorted(np.cumsum(shares[order]), 0.5))
    return ResolutionFigures(
        resolution=resolution,
        share_below=round(float(shares[heights < smallest].sum()), 6),
        median_height=round(float(heights[order][min(middle, len(order) - 1)]), 2),
        image_tokens=round(sum(image_tokens) / len(texts), 1),
        tower_images=round(sum(tower_images) / len(texts), 2),
        longest=-(-longest // _ROUNDED) * _ROUNDED,
    )


def _weighted(heights: Sequence[float], texts: Sequence[RecordText]) -> tuple[np.ndarray, np.ndarray]:
    """Return the heights of all lines, and the share of the whole text of each."""
    shares = np.array([share for text in texts for _, _, share in text.lines])
    return np.array(heights), shares / shares.sum()


def _settings(resolution: Tiles | CrossAttention) -> dict[str, Any]:
    """Return the settings that a recipe needs: the others are at their defaults."""
    if isinstance(resolution, CrossAttention):
        encoder = {} if resolution.encoder == CrossAttention.encoder else {"encoder": resolution.encoder}
        return {"type": "cross_attention", **encoder, "grid": resolution.grid}
    most = max(rows * columns for rows, columns in resolution.grids)
    grids: dict[str, Any] = {"max_tiles": most}
    if sorted(resolution.grids) != sorted(Tiles(max_tiles=most).grids):
        grids = {"grid": [list(grid) for grid in resolution.grids]}
    pool = {"pool": resolution.pool} if resolution.pool > 1 else {}
    return {"type": "tiles", **grids, **pool}


def _pool(resolution: Tiles | CrossAttention | None) -> int:
    """Return the number of patches, in each direction, that a resolution averages."""
    return resolution.pool if isinstance(resolution, Tiles) else 1


def _suffices(figures: ResolutionFigures) -> bool:
    """Return whether enough of the text can be read."""
    return 1 - figures.share_below >= ENOUGH
