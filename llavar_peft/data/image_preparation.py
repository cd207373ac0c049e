"""Convert an image to a tensor in one of the original's four modes, with the original's pixels.

``pad``        training: centred on a square of CLIP's mean colour
``square``     training: short side resized, centre cropped
``keep``       training: aspect ratio kept, long side at most 448, no crop; the number of patches depends on the image
``pad_black``  inference: long side resized, padded with black on the right and below

With tiles (``prepare_tiles``), the mode does not matter: the whole image is resized to the tower's square, and the
tiles are cut from an image that is resized and padded with black, as LLaVA-NeXT does.

Pillow does the geometry. Rescaling and normalizing are transformers' own functions, applied once to the 256 possible
values instead of to each pixel; the result is bit-equal to that of ``CLIPImageProcessor``. Shapes: H and W pixels, C
channels, V 8-bit values.

Source: LLaVAR, llava/train/train.py, ``LazySupervisedDataset``; llava/eval/run_llava.py, ``resize_image``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from llavar_peft.data.image_files import open_image
from llavar_peft.errors import DAMAGED, ConfigError, LlavarError, describe_reason
from llavar_peft.types import ImageMode, Processor, TileLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


_KEEP_LONG: Final = 448
_KEEP_SHORT: Final = 224
_BAND_PIXELS: Final = 2**22  # pixels of a padded image that are in memory at once
_LONGEST_PADDED: Final = 16_384  # pixels; a longer strip is scaled down before it is padded
_LONGEST_PADDED_RATIO: Final = 8
_LARGEST_SIDE: Final = 4096
_FIX_SETTINGS: Final = "use the preprocessor_config.json of the vision tower"
_LONGEST_RATIO: Final = 32  # of a more elongated image only the area of the crop is resized


@dataclass(frozen=True, slots=True)
class _Settings:
    """The settings of an image processor.

    Attributes:
        short: Length in pixels of the short side after resizing; None if ``fixed`` gives both sides.
        fixed: (width, height) of every image after resizing.
        crop: (width, height) of the centre crop; None for no crop.
        min_side: Minimum length of each side in mode ``keep``, in pixels.
        resample: Pillow's filter.
        colour: CLIP's mean as an 8-bit colour.
        table_3V: Normalized value of each 8-bit value, float32 ``[3, 256]``.
    """

    short: int | None
    fixed: tuple[int, int] | None
    crop: tuple[int, int] | None
    min_side: int
    resample: Image.Resampling
    colour: tuple[int, ...]
    table_3V: np.ndarray


def prepare_image(image: Image.Image | str | Path, mode: ImageMode, processor: Any) -> Tensor:
    """Prepare an image for the vision tower.

    Args:
        image: An image or a local path, as in ``open_image``.
        mode: One of the modes described at the top of this file.
        processor: A ``LlavarProcessor``, or a CLIP image processor, whose sizes and normalization are used.

    Returns:
        float32 ``[3, H, W]``.

    Raises:
        ImageError: The image cannot be opened.
        ConfigError: The mode is unknown, or the image processor does something that CLIP's does not.
    """
    if mode not in _MODES:
        raise ConfigError.at(
            "image_mode", f"unknown mode (got {mode!r}, expected one of {', '.join(_MODES)})", "choose one of these"
        )
    settings = image_settings(processor)
    return _tensor(_MODES[mode](open_image(image), settings), settings.table_3V)


def prepare_tiles(image: Image.Image | str | Path, layout: TileLayout | None, processor: Processor) -> Tensor:
    """Prepare an image as the whole and its tiles, with the pixels of LLaVA-NeXT.

    Args:
        image: An image or a local path, as in ``open_image``.
        layout: How it is cut, from ``processor.tile_geometry``; None chooses the best grid.
        processor: The processor of a model with tiles.

    Returns:
        float32 ``[1 + rows * columns, 3, S, S]``, the tiles in reading order.

    Raises:
        ImageError: The image cannot be opened.
    """
    import torch

    opened, settings, geometry = open_image(image), image_settings(processor), processor.tile_geometry
    side, (rows, columns) = geometry.side, (layout or geometry.layouts([opened.size])[0])[:2]
    width, height = geometry.resized(opened.size, (rows, columns))
    canvas = Image.new("RGB", (columns * side, rows * side))
    place = (canvas.width - width) // 2, (canvas.height - height) // 2
    canvas.paste(opened.resize((width, height), settings.resample), place)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    views = [opened.resize((side, side), settings.resample), *(canvas.crop(box) for box in boxes)]
    return torch.stack([_tensor(view, settings.table_3V) for view in views])


def prepare_crops(image: Image.Image | str | Path, mode: ImageMode, processor: Processor, grid: int) -> Tensor:
    """Prepare an image at a multiple of the tower's size, cut into crops of that size.

    Args:
        image: An image or a local path, as in ``open_image``.
        mode: ``pad``, ``square`` or ``pad_black``.
        processor: A ``LlavarProcessor``.
        grid: Rows, and columns, of the crops.

    Returns:
        float32 ``[grid * grid, 3, S, S]``, in reading order.

    Raises:
        ImageError: The image cannot be opened.
        ConfigError: The mode keeps the shape of the image.
    """
    if mode == "keep":
        raise ConfigError.at("image_mode", "keep has no crops of one size", "choose pad, square or pad_black")
    settings = image_settings(processor)
    larger = replace(
        settings,
        short=None if settings.short is None else settings.short * grid,
        fixed=None if settings.fixed is None else (settings.fixed[0] * grid, settings.fixed[1] * grid),
        crop=None if settings.crop is None else (settings.crop[0] * grid, settings.crop[1] * grid),
    )
    whole_3HW = _tensor(_MODES[mode](open_image(image), larger), settings.table_3V)
    side = whole_3HW.shape[-1] // grid
    crops_3GGSS = whole_3HW.unfold(1, side, side).unfold(2, side, side)
    return crops_3GGSS.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def image_token_count(size: Tensor | tuple[int, int], patch_size: int) -> int:
    """Return the number of image tokens of an image, which is the number of its complete patches.

    Args:
        size: A prepared image ``[3, H, W]``, or its (H, W) in pixels.
        patch_size: Side of a patch in pixels.
    """
    height, width = (int(side) for side in (size if isinstance(size, tuple) else size.shape[-2:]))
    return (height // patch_size) * (width // patch_size)


def prepared_scale(size: tuple[int, int], mode: ImageMode, processor: Any) -> float:
    """Return the factor from the height of something in an image to its height in the prepared image.

    Args:
        size: (width, height) of the image.
        mode: How the image is prepared.
        processor: As for ``prepare_image``, or the side in pixels to which CLIP's image processor resizes.
    """
    width, height = size
    if mode == "keep":
        return min(_KEEP_LONG / max(size), _KEEP_SHORT / min(size))
    if mode != "square":
        width = height = max(size)
    if isinstance(processor, int):
        return processor / min(width, height)
    return _resized_size((width, height), image_settings(processor))[1] / height


def kept_size(size: tuple[int, int], min_side: int) -> tuple[int, int]:
    """Return the (width, height) of an image after preparation in mode ``keep``.

    Args:
        size: (width, height) of the image.
        min_side: Minimum length of each side in pixels: that of a patch.
    """
    short, long = sorted(size)
    new_short = int(min(_KEEP_LONG / (long / short), _KEEP_SHORT))
    new_long = int(new_short * long / short) if new_short else _KEEP_LONG
    new_short, new_long = max(new_short, min_side), max(new_long, min_side)
    return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)


def _square(image: Image.Image, settings: _Settings) -> Image.Image:
    """Resize as the processor does, then crop the centre."""
    width, height = _resized_size(image.size, settings)
    if settings.crop is None:
        return image.resize((width, height), settings.resample)
    crop_width, crop_height = settings.crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    if max(width, height) > _LONGEST_RATIO * min(width, height) and min(left, top) >= 0:
        # The resized image would take gigabytes (600 x 1 becomes 201600 x 336): resize the area of the crop only.
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
        return image.resize(settings.crop, settings.resample, box=box)
    resized = image.resize((width, height), settings.resample)
    return resized.crop((left, top, left + crop_width, top + crop_height))


def _pad(image: Image.Image, settings: _Settings) -> Image.Image:
    """Centre on a square of the mean colour, then resize and crop as ``_square`` does.

    Pillow resizes along rows, then along columns. To save memory the padded square is never built: rows are resized in
    bands, and only those that contain the image. The pixels are the same.
    """
    width, height = image.size
    if width == height:
        return _square(image, settings)
    side = max(width, height)
    if side > _LONGEST_PADDED and side > _LONGEST_PADDED_RATIO * min(width, height):
        # The square grows with the square of the side: a strip of a million pixels would take hours.
        width, height = (max(1, length * _LONGEST_PADDED // side) for length in image.size)
        image, side = image.resize((width, height), Image.Resampling.BOX), _LONGEST_PADDED
    new_width, new_height = _resized_size((side, side), settings)
    left, top = (side - width) // 2, (side - height) // 2
    columns = Image.new("RGB", (new_width, side), settings.colour)
    rows = max(1, _BAND_PIXELS // side)
    for start in range(0, height, rows):
        stop = min(height, start + rows)
        band = image.crop((0, start, width, stop))
        if width < side:
            padded = Image.new("RGB", (side, stop - start), settings.colour)
            padded.paste(band, (left, 0))
            band = padded
        columns.paste(band.resize((new_width, stop - start), settings.resample), (0, top + start))
    resized = columns.resize((new_width, new_height), settings.resample)
    if settings.crop is None:
        return resized
    x, y = (new_width - settings.crop[0]) // 2, (new_height - settings.crop[1]) // 2
    return resized.crop((x, y, x + settings.crop[0], y + settings.crop[1]))


def _keep(image: Image.Image, settings: _Settings) -> Image.Image:
    """Resize to a long side of at most 448 and a short side of at most 224 pixels.

    Each side has at least one patch if the size of a patch is known (the original's tower fails below that), else one
    pixel.
    """
    return image.resize(kept_size(image.size, settings.min_side), settings.resample)


def _pad_black(image: Image.Image, settings: _Settings) -> Image.Image:
    """Resize the long side to the crop, pad with black on the right and below, then continue as ``_square``."""
    width, height = settings.crop or _resized_size((1, 1), settings)
    ratio = image.width / image.height
    # The original rounds this quotient down and uses Pillow's default filter, which is bicubic.
    size = (width, int(width / ratio)) if ratio > 1 else (int(height * ratio), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize((max(1, size[0]), max(1, size[1])), Image.Resampling.BICUBIC), (0, 0))
    return _square(canvas, settings)


_MODES: Final[dict[str, Callable[[Image.Image, _Settings], Image.Image]]] = {
    "pad": _pad,
    "square": _square,
    "keep": _keep,
    "pad_black": _pad_black,
}


def _resized_size(size: tuple[int, int], settings: _Settings) -> tuple[int, int]:
    """Return (width, height) after the processor's resizing."""
    if settings.short is None:
        return settings.fixed or size
    width, height = size
    if width <= height:
        return settings.short, int(settings.short * height / width)
    return int(settings.short * width / height), settings.short


def _tensor(image: Image.Image, table_3V: np.ndarray) -> Tensor:
    import torch

    pixels_HWC = np.asarray(image)
    return torch.from_numpy(np.stack([table_3V[c].take(pixels_HWC[..., c]) for c in range(3)]))


def image_settings(processor: Any) -> _Settings:
    """Read the settings of an image processor, which come from a file.

    Raises:
        ConfigError: A value is missing, or none that images can be prepared with.
    """
    try:
        return _checked_settings(processor)
    except (*DAMAGED, ZeroDivisionError) as error:
        if isinstance(error, LlavarError):
            raise
        raise ConfigError.at(
            "preprocessor_config.json", f"unusable settings of images ({describe_reason(error)})", _FIX_SETTINGS
        ) from error


def _checked_settings(processor: Any) -> _Settings:
    images = getattr(processor, "image_processor", processor)
    size, crop = dict(images.size or {}), dict(images.crop_size or {})
    short, height, width = size.get("shortest_edge"), size.get("height"), size.get("width")
    if images.do_resize and (size.get("longest_edge") or not (short or (height and width))):
        raise ConfigError.at(
            "preprocessor_config.json",
            f"unsupported size (got {size}, expected shortest_edge, or height and width)",
            _FIX_SETTINGS,
        )
    for name, side in {**size, **crop, "patch_size": getattr(processor, "patch_size", 1)}.items():
        if side is not None and not (isinstance(side, int) and 0 < side <= _LARGEST_SIDE):
            raise ValueError(f"{name} is {ascii(side)[:40]}, expected 1 to {_LARGEST_SIDE} pixels")
    if len(images.image_mean) != 3 or not all(0 <= mean <= 1 for mean in images.image_mean):
        raise ValueError(f"image_mean is {ascii(images.image_mean)[:40]}, expected three numbers from 0 to 1")
    if len(images.image_std) != 3 or not all(math.isfinite(std) and std for std in images.image_std):
        raise ValueError(f"image_std is {ascii(images.image_std)[:40]}, expected three numbers")
    fixed = (int(width), int(height)) if images.do_resize and not short and width and height else None
    return _Settings(
        short=int(short) if images.do_resize and short else None,
        fixed=fixed,
        crop=(int(crop["width"]), int(crop["height"])) if images.do_center_crop else None,
        min_side=int(getattr(processor, "patch_size", 1)),
        resample=Image.Resampling(int(images.resample)),
        colour=tuple(int(mean * 255) for mean in images.image_mean),
        table_3V=_table_3V(
            float(images.rescale_factor) if images.do_rescale else None,
            tuple(images.image_mean) if images.do_normalize else None,
            tuple(images.image_std) if images.do_normalize else None,
        ),
    )


@lru_cache(maxsize=8)
def _table_3V(scale: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> np.ndarray:
    """Rescale and normalize every 8-bit value with the functions of transformers, float32 ``[3, 256]``."""
    from transformers.image_transforms import normalize, rescale

    values: np.ndarray = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if scale is not None:
        values = rescale(values, scale, input_data_format="channels_first")
    if mean is not None and std is not None:
        values = normalize(values, mean, std, input_data_format="channels_first")
    return np.ascontiguousarray(values[:, 0], dtype=np.float32)
