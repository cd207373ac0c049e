"""How a model reads small letters: ``ModelConfig.resolution``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from llavar_peft.errors import ConfigError, describe_reason
from llavar_peft.recipe.schema_types import PathText, PositiveInteger, StrictFields

_LARGEST_GRID = 64  # tiles
_MOST_GRIDS = 300
"""All grids of at most 64 tiles are 280."""


def _as_grids(value: object) -> tuple[tuple[int, int], ...]:
    """Read ``[[1, 2], [2, 2]]``, or ``[2, 2]``, the short form of a single grid."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if listed and all(type(side) is int for side in listed):
        listed = [listed]
    grids = [tuple(grid) if isinstance(grid, list | tuple) else () for grid in listed]
    if len(grids) > _MOST_GRIDS:
        raise PydanticCustomError("grid", f"expected at most {_MOST_GRIDS} grids")
    for grid in grids:
        positive = len(grid) == 2 and all(type(side) is int and side > 0 for side in grid)
        if not positive or grid[0] * grid[1] > _LARGEST_GRID:
            message = f"expected (rows, columns) with at most {_LARGEST_GRID} tiles, or a list of them"
            raise PydanticCustomError("grid", message)
    return tuple((grid[0], grid[1]) for grid in grids)


def _as_pool(value: object) -> object:
    """Reject what Python takes for 1 or 2: true, and 1.0."""
    if isinstance(value, bool | float):
        raise PydanticCustomError("pool", "expected 1 or 2")
    return value


@dataclass(frozen=True, kw_only=True, repr=False)
class Tiles(StrictFields):
    """Cut each image into tiles of the tower's size, which follow the whole image in the sequence, as in LLaVA-NeXT.

    The image is resized into the grid of tiles that keeps most of its pixels, and padded to it; the features of the
    padding are left out, and a trained embedding ends each row of patches. Source: LLaVA-NeXT (January 2024).
    """

    type: Literal["tiles"] = "tiles"
    """Selects this method."""
    max_tiles: Annotated[int, Field(ge=1, le=_LARGEST_GRID)] = 4
    """Maximum number of tiles of an image: all grids with at most this many tiles can be chosen."""
    grid: Annotated[tuple[tuple[int, int], ...], BeforeValidator(_as_grids)] = ()
    """The grids that can be chosen, as (rows, columns), instead of ``max_tiles``; one grid or a list."""
    pool: Annotated[Literal[1, 2], BeforeValidator(_as_pool)] = 1
    """2 averages 2 x 2 patches before the projector, for a quarter of the image tokens."""
    max_image_tokens: PositiveInteger | None = None
    """Maximum number of image tokens of a record, shared by its images: each gets the largest grid that fits. None
    limits them in training only, to what ``max_length`` leaves after the text."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The grids that can be chosen, as (rows, columns), in the order that decides between equally good ones."""
        if self.grid:
            flat = isinstance(self.grid[0], int)  # Python does not convert the short form
            return (self.grid,) if flat else self.grid  # type: ignore[return-value]
        sides = range(1, self.max_tiles + 1)
        return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= self.max_tiles)


CONCAT_CLIP: Final = "concat_clip"
"""The encoder that is the model's own tower, on crops of the image."""


@dataclass(frozen=True, kw_only=True, repr=False)
class CrossAttention(StrictFields):
    """Let every layer of the language model attend to the features of a second, frozen encoder of higher resolution.

    The sequence does not grow. Source: LLaVAR, appendix H.
    """

    type: Literal["cross_attention"] = "cross_attention"
    """Selects this method."""
    encoder: PathText = CONCAT_CLIP
    """``concat_clip`` runs the crops of an enlarged image through the model's own vision tower; otherwise the folder or
    hub name of an encoder: Pix2Struct, or another vision tower."""
    grid: Annotated[int, Field(ge=1, le=8)] = 4
    """The enlarged image is cut into ``grid`` x ``grid`` crops of the tower's size."""


Resolution = Annotated[Tiles | CrossAttention, Field(discriminator="type")]


def resolution_from(
    settings: object, where: str, fix: str = "download or copy the file again"
) -> Tiles | CrossAttention | None:
    """Read the resolution of a saved model or processor, which comes from a file.

    Args:
        settings: A mapping; None stands for the whole image only.
        where: The file and the key, for the message.
        fix: What to do about faulty settings.

    Raises:
        ConfigError: They are not the settings of a resolution.
    """
    try:
        return _adapter().validate_json(json.dumps(settings))
    except (ValidationError, ValueError, TypeError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        reason = describe_reason(error)
        if first is not None:
            reason = ".".join(map(str, first["loc"])) + ": " * bool(first["loc"]) + first["msg"]
        what = f"not readable as tiles or cross-attention ({reason[:200]}, got {ascii(settings)[:120]})"
        raise ConfigError.at(where, what, fix) from error


def checked_resolution(resolution: object, where: str) -> Tiles | CrossAttention | None:
    """Check a resolution that was built in Python, which does not check types.

    Raises:
        ConfigError: A value is out of its range or of another type.
    """
    fix = "write for example Tiles(max_tiles=4), Tiles(grid=(2, 2)) or CrossAttention()"
    plain = asdict(resolution) if isinstance(resolution, Tiles | CrossAttention) else ascii(resolution)[:80]
    return resolution_from(plain, where, fix)


def read_grids(pinpoints: object, side: int, where: str) -> tuple[tuple[int, int], ...]:
    """Return the grids of LLaVA-NeXT's sizes of images.

    Args:
        pinpoints: In pixels; in stock transformers (height, width), and the grids are then (rows, columns).
        side: Side of a tile in pixels.
        where: The file and the key, for the message.

    Raises:
        ConfigError: A size is no multiple of a tile, or the grid is too large.
    """
    grids, sizes = [], pinpoints if isinstance(pinpoints, list | tuple) else [pinpoints]
    if len(sizes) > _MOST_GRIDS:
        what = f"too many sizes of images (got {len(sizes)}, expected at most {_MOST_GRIDS})"
        raise ConfigError.at(where, what, "copy config.json from the model's original folder")
    for size in sizes:
        sides = size if isinstance(size, list | tuple) else ()
        whole = len(sides) == 2 and all(type(length) is int and length > 0 and length % side == 0 for length in sides)
        if not whole or sides[0] * sides[1] > _LARGEST_GRID * side**2:
            raise ConfigError.at(
                where,
                f"not a size of whole tiles (got {ascii(size)[:60]}, expected two multiples of {side}, for at most "
                f"{_LARGEST_GRID} tiles)",
                "copy config.json and preprocessor_config.json from the model's original folder",
            )
        grids.append((sides[0] // side, sides[1] // side))
    return tuple(grids)


def describe_resolution(resolution: Tiles | CrossAttention | None) -> dict[str, Any] | None:
    """Return a resolution as it is saved; the grids of tiles are written out."""
    if isinstance(resolution, Tiles):
        resolution = replace(resolution, grid=resolution.grids)
    plain: dict[str, Any] | None = None if resolution is None else _adapter().dump_python(resolution, mode="json")
    return plain


@cache
def _adapter() -> TypeAdapter[Tiles | CrossAttention | None]:
    return TypeAdapter(Annotated[Resolution | None, Field()])
