"""Captions of images whose text was painted over, by a model at an OpenAI-compatible endpoint that sees images.

Source: arXiv 2306.17107, section 3: BLIP-2 captions of images whose text was removed by Telea's inpainting, so that a
caption says what the text cannot. The wording of the request is our own.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from llavar_peft.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.datagen.ocr.ocr_lines import Polygon
    from llavar_peft.datagen.openai_client import ChatModel

CAPTION_REQUEST: Final = (
    "Describe in one sentence what this image shows. The text in it was painted over: do not guess what it said."
)
_LONGEST: Final = 768  # pixels of the longer side that is sent
_RADIUS: Final = 3  # pixels around a removed one from which Telea's method takes colours
_MARGIN: Final = 0.15  # of a line's height that is painted over around it
_QUALITY: Final = 85


class ImageCaptioner:
    """Asks a model for captions; safe for use by several threads.

    Args:
        model: The model, with its journal of replies.
        roots: The folders of the images.

    Raises:
        MissingDependencyError: OpenCV is not installed.
    """

    def __init__(self, model: ChatModel, roots: ImageRoots) -> None:
        try:
            import cv2  # noqa: F401
        except ImportError as error:
            fix = "pip install opencv-python-headless"
            raise MissingDependencyError.at("opencv", f"is not installed ({error})", fix) from error
        self.model = model
        self._roots = roots

    def caption(self, path: str, polygons: Sequence[Polygon]) -> str:
        """Return the caption of an image.

        Args:
            path: The image's path in its folder.
            polygons: The corners of its lines of text, in its pixels.

        Raises:
            ImageError: The image cannot be opened.
            EndpointRejectedError: The endpoint does not accept the request.
            InterruptedRunError: The endpoint keeps failing.
            EnvironmentFaultError: The key, the address or the model's name is wrong.
        """
        file = io.BytesIO()
        paint_over(self._roots.open(path), polygons).save(file, "JPEG", quality=_QUALITY)
        address = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": CAPTION_REQUEST}]
        return " ".join(self.model.ask([{"role": "user", "content": content}]).split())


def paint_over(image: Image, polygons: Sequence[Polygon]) -> Image:
    """Return an image, scaled down if it is large, with its lines of text replaced by their surroundings.

    Args:
        image: RGB.
        polygons: The corners of its lines, in its pixels.
    """
    import cv2
    from PIL import Image as Pillow

    scale = min(1.0, _LONGEST / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    mask_HW = np.zeros((small.height, small.width), np.uint8)
    for polygon in polygons:
        corners_42 = np.array(polygon) * scale
        height = max(1.0, float(np.linalg.norm(corners_42[0] - corners_42[3])))
        cv2.fillPoly(mask_HW, [np.round(corners_42).astype(np.int32)], 255)
        cv2.polylines(mask_HW, [np.round(corners_42).astype(np.int32)], True, 255, max(1, round(2 * _MARGIN * height)))
    return Pillow.fromarray(cv2.inpaint(np.asarray(small), mask_HW, _RADIUS, cv2.INPAINT_TELEA))
