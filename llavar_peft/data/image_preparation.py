"""How an image becomes a tensor, in the original's four ways and to its pixels.

``pad``        training: centred on a square of CLIP's mean colour
``square``     training: short side to size, centre cropped
``keep``       training: aspect ratio kept, long side at most 448, no crop; the number of patches depends on the image
``pad_black``  inference: long side to size, black to the right and below

Geometry is Pillow's, rescaling and normalising are transformers' own functions, applied once to the 256 possible values
rather than to each pixel; the result is bit-equal to ``CLIPImageProcessor``'s.

Source: LLaVAR, llava/train/train.py, ``LazySupervisedDataset``; llava/eval/run_llava.py, ``resize_image``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from llavar_peft.data.image_files import MAX_PIXELS, open_image
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.errors import ConfigError
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["MAX_PIXELS", "ImageRoots", "image_token_count", "open_image", "prepare_image"]

_KEEP_LONG: Final = 448
_KEEP_SHORT: Final = 224
_BAND_PIXELS: Final = 2**22  # of a padded image that are in memory at once
_LONGEST_PADDED: Final = 16_384  # pixels; beyond it a strip is made shorter before it is padded
_LONGEST_PADDED_RATIO: Final = 8
_LONGEST_RATIO: Final = 32  # beyond it only what the crop shows is resized


@dataclass(frozen=True, slots=True)
class _Settings:
    """What an image processor says, in one form.

    Attributes:
        short: Side in pixels that the short one becomes; None where ``fixed`` says both.
        fixed: (width, height) that images are resized to, whatever their shape.
        crop: (width, height) of the centre crop, None for none.
        least: Pixels that each side has at least in mode ``keep``.
        resample: Pillow's filter.
        colour: CLIP's mean as 8-bit colour.
        table: Normalised value of each 8-bit one, float32 ``[3, 256]``.
    """

    short: int | None
    fixed: tuple[int, int] | None
    crop: tuple[int, int] | None
    least: int
    resample: Image.Resampling
    colour: tuple[int, ...]
    table: np.ndarray


def prepare_image(image: Image.Image | str | Path, mode: ImageMode, processor: Any) -> Tensor:
    """Prepare an image for the vision tower.

    Args:
        image: An image or a local path; see ``open_image``.
        mode: Which way; see the top of this file.
        processor: A ``LlavarProcessor``, or a CLIP image processor, which sizes and normalisation are taken from.

    Returns:
        float32 ``[3, H, W]``.

    Raises:
        ImageError: The image cannot be opened.
        ConfigError: The mode is unknown, or the image processor does something else than CLIP's.
    """
    if mode not in _MODES:
        raise ConfigError.at("image_mode", f"got {mode!r}, expected one of {', '.join(_MODES)}", "choose one of these")
    settings = _settings(processor)
    return _tensor(_MODES[mode](open_image(image), settings), settings.table)


def image_token_count(size: Tensor | tuple[int, int], patch_size: int) -> int:
    """Count an image's image tokens: its whole patches.

    Args:
        size: A prepared image ``[3, H, W]``, or its (H, W) in pixels.
        patch_size: Side of a patch, in pixels.

    Returns:
        Their number.
    """
    height, width = (int(side) for side in (size if isinstance(size, tuple) else size.shape[-2:]))
    return (height // patch_size) * (width // patch_size)


def _square(image: Image.Image, settings: _Settings) -> Image.Image:
    """Resized as the processor says, then cropped at the centre."""
    width, height = _resized_size(image.size, settings)
    if settings.crop is None:
        return image.resize((width, height), settings.resample)
    crop_width, crop_height = settings.crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    if max(width, height) > _LONGEST_RATIO * min(width, height) and min(left, top) >= 0:
        # The whole would take gigabytes (a 600 x 1 strip becomes 201600 x 336); resize what is looked at.
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
        return image.resize(settings.crop, settings.resample, box=box)
    resized = image.resize((width, height), settings.resample)
    return resized.crop((left, top, left + crop_width, top + crop_height))


def _pad(image: Image.Image, settings: _Settings) -> Image.Image:
    """Centred on a square of the mean colour, then as ``_square``.

    Pillow resizes along rows, then along columns. The padded square is never made whole: rows are resized band by band
    (and only those that the image is in), which gives the same pixels from less memory.
    """
    width, height = image.size
    if width == height:
        return _square(image, settings)
    side = max(width, height)
    if side > _LONGEST_PADDED and side > _LONGEST_PADDED_RATIO * min(width, height):
        # The square has as many pixels as the side squared: hours for a strip of a million pixels.
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
    """Long side at most 448, short side at most 224.

    Each side has at least one patch where the patch's size is known (the original's tower stops at less), else a pixel.
    """
    short, long = sorted(image.size)
    new_short = int(min(_KEEP_LONG / (long / short), _KEEP_SHORT))
    new_long = int(new_short * long / short) if new_short else _KEEP_LONG
    new_short, new_long = max(new_short, settings.least), max(new_long, settings.least)
    size = (new_short, new_long) if image.width <= image.height else (new_long, new_short)
    return image.resize(size, settings.resample)


def _pad_black(image: Image.Image, settings: _Settings) -> Image.Image:
    """Long side to the crop's size, black to the right and below, then as ``_square``."""
    width, height = settings.crop or _resized_size((1, 1), settings)
    ratio = image.width / image.height
    # Rounding down, and of this very quotient, is the original's; the filter there is Pillow's default.
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
    """(width, height) after the processor's resizing."""
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


def _settings(processor: Any) -> _Settings:
    images = getattr(processor, "image_processor", processor)
    size, crop = dict(images.size or {}), dict(images.crop_size or {})
    short, height, width = size.get("shortest_edge"), size.get("height"), size.get("width")
    if images.do_resize and (size.get("longest_edge") or not (short or (height and width))):
        raise ConfigError.at(
            "preprocessor_config.json",
            f"size is {size}, expected shortest_edge, or height and width",
            "use the vision tower's own preprocessor_config.json",
        )
    fixed = (int(width), int(height)) if images.do_resize and not short and width and height else None
    return _Settings(
        short=int(short) if images.do_resize and short else None,
        fixed=fixed,
        crop=(int(crop["width"]), int(crop["height"])) if images.do_center_crop else None,
        least=int(getattr(processor, "patch_size", 1)),
        resample=Image.Resampling(int(images.resample)),
        colour=tuple(int(mean * 255) for mean in images.image_mean),
        table=_table(
            float(images.rescale_factor) if images.do_rescale else None,
            tuple(images.image_mean) if images.do_normalize else None,
            tuple(images.image_std) if images.do_normalize else None,
        ),
    )


@lru_cache(maxsize=8)
def _table(scale: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> np.ndarray:
    """The library's own rescaling and normalising of every 8-bit value, float32 ``[3, 256]``."""
    from transformers.image_transforms import normalize, rescale

    values: np.ndarray = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if scale is not None:
        values = rescale(values, scale, input_data_format="channels_first")
    if mean is not None and std is not None:
        values = normalize(values, mean, std, input_data_format="channels_first")
    return np.ascontiguousarray(values[:, 0], dtype=np.float32)
