"""An image as the model gets it, and the images of a batch: the views of the tower, and the second encoder's input.

Shapes: N images, V views of an image (the whole and its tiles), G crops, H, W and S pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llavar_peft.data.image_files import open_image
from llavar_peft.data.image_preparation import image_token_count, prepare_crops, prepare_image, prepare_tiles
from llavar_peft.errors import ConfigError
from llavar_peft.types import ImageMode, Processor, TileLayout

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image as the model gets it.

    Attributes:
        pixels: float32 ``[3, H, W]``, with tiles ``[V, 3, S, S]``.
        tokens: Number of its image tokens.
        layout: How it is cut into tiles; None without tiles.
        detail: The second encoder's input, for crops float32 ``[G, 3, S, S]``; None without one.
    """

    pixels: Tensor
    tokens: int
    layout: TileLayout | None = None
    detail: Tensor | None = None

    @classmethod
    def prepare(
        cls,
        image: Image.Image | str | Path,
        mode: ImageMode,
        processor: Processor,
        layout: TileLayout | None = None,
    ) -> PreparedImage:
        """Prepare an image as the model's resolution asks for it.

        Args:
            image: An image or a local path, as in ``open_image``.
            mode: How it is prepared, without tiles.
            processor: The model's processor.
            layout: How it is cut into tiles; None chooses the best grid.

        Raises:
            ImageError: The image cannot be opened.
            ConfigError: The mode is unknown or, for a model with a resolution, ``keep``; or the image processor does
                something that CLIP's does not.
        """
        opened, geometry = open_image(image), processor.tile_geometry
        if geometry is not None and mode == "keep":
            raise ConfigError.at(
                "image_mode", "keep is for models without a resolution (this one reads tiles)", "leave it out"
            )
        if geometry is not None:
            layout = layout or geometry.layouts([opened.size])[0]
            return cls(prepare_tiles(opened, layout, processor), geometry.tokens(layout), layout)
        pixels = prepare_image(opened, mode, processor)
        return cls(pixels, image_token_count(pixels, processor.patch_size), None, _detail(opened, mode, processor))


def _detail(image: Image.Image, mode: ImageMode, processor: Processor) -> Tensor | None:
    """Prepare an image for the cross-attention; None for a model without it."""
    if processor.detail_grid is not None:
        return prepare_crops(image, mode, processor, processor.detail_grid)
    detail_processor = processor.detail_processor
    if detail_processor is None:
        return None
    if "flattened_patches" in detail_processor.model_input_names:  # Pix2Struct's, of any shape of image
        return torch.as_tensor(detail_processor(images=image, return_tensors="pt")["flattened_patches"][0])
    return prepare_image(image, mode, detail_processor)


def prepare_record_images(
    images: Sequence[Image.Image | str | Path], mode: ImageMode, processor: Processor, *, used: int = 0
) -> list[PreparedImage]:
    """Prepare the images of one record or prompt, which share the model's limit of image tokens.

    Args:
        images: Images or local paths, in order.
        mode: As for ``PreparedImage.prepare``.
        processor: The model's processor.
        used: Number of image tokens of the images before them.

    Raises:
        ImageError: An image cannot be opened.
        ConfigError: As for ``PreparedImage.prepare``.
    """
    geometry, opened = processor.tile_geometry, [open_image(image) for image in images]
    layouts: Sequence[TileLayout | None] = [None] * len(opened)
    if geometry is not None:
        remaining = None if geometry.budget is None else max(0, geometry.budget - used)
        layouts = geometry.layouts([image.size for image in opened], remaining)
    return [
        PreparedImage.prepare(image, mode, processor, layout) for image, layout in zip(opened, layouts, strict=True)
    ]


def image_inputs(
    pixels: Sequence[Tensor], layouts: Sequence[TileLayout] = (), details: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Return the model's arguments for the images of a batch; nothing without an image.

    Args:
        pixels: Each image's ``[3, H, W]``, with tiles ``[V, 3, S, S]``, in reading order.
        layouts: How each image is cut; empty without tiles.
        details: Each image's input of the second encoder; empty without one.

    Returns:
        ``pixel_values``, and with tiles ``image_layouts``, with a second encoder ``detail_values``.
    """
    if not pixels:
        return {}
    inputs: dict[str, Any] = {}
    if layouts:
        inputs = {"pixel_values": torch.cat(list(pixels)), "image_layouts": tuple(layouts)}
    else:
        same_size = len({image.shape for image in pixels}) == 1
        inputs["pixel_values"] = torch.stack(list(pixels)) if same_size else list(pixels)
    return {**inputs, "detail_values": torch.stack(list(details))} if details else inputs
