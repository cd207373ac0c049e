"""Kinds of images by zero-shot classification with any CLIP.

Source: arXiv 2306.17107, section 3: categories by similarity with nine prompts each, and "Other" below 0.15. The paper
does not print its prompts; those here are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from llavar_peft.errors import DAMAGED, ConfigError, describe_reason
from llavar_peft.weights.io.hub_folders import find_folder

if TYPE_CHECKING:
    from PIL.Image import Image

OTHER: Final = "Other"
LEAST_SIMILARITY: Final = 0.15
"""Minimum similarity with a category. Source: arXiv 2306.17107, section 3."""
PROMPTS: Final = (
    "a photo of a {}.",
    "an image of a {}.",
    "a scan of a {}.",
    "a drawing of a {}.",
    "this is a {}.",
    "a {} with text on it.",
    "a close-up of a {}.",
    "a cropped photo of a {}.",
    "a low resolution photo of a {}.",
)


class ImageCategories:
    """A CLIP and the categories between which it decides.

    Args:
        clip: A folder of transformers' CLIP with its processor.
        names: The categories, for example ``"book cover"``.

    Raises:
        ConfigError: The folder has no CLIP that can be loaded.
    """

    def __init__(self, clip: Path, names: Sequence[str]) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self._names = tuple(names)
        try:
            clip = find_folder(clip, "--clip")
            local: dict[str, Any] = {"local_files_only": True}
            model = CLIPModel.from_pretrained(clip, use_safetensors=True, trust_remote_code=False, **local)
            self._processor = CLIPProcessor.from_pretrained(clip, trust_remote_code=False, **local)
            self._model = model.eval()
        except DAMAGED as error:
            raise ConfigError.at(
                str(clip), f"has no CLIP that can be loaded ({describe_reason(error)})", "give the folder of a CLIP"
            ) from error
        prompts = [prompt.format(name) for name in names for prompt in PROMPTS]
        self._inputs = self._processor(text=prompts, return_tensors="pt", padding=True, truncation=True)
        self._centres: torch.Tensor | None = None

    def similarities(self, image: Image) -> list[float]:
        """Return the similarity of an RGB image with each category: the cosine of the image and of its mean prompt."""
        pixels = self._processor(images=image, return_tensors="pt")
        with torch.inference_mode():
            if self._centres is None:
                seen = self._model(**self._inputs, **pixels)
                texts_KPD = seen.text_embeds.unflatten(0, (len(self._names), len(PROMPTS)))
                self._centres = torch.nn.functional.normalize(texts_KPD.mean(dim=1), dim=-1)
            else:
                one = {name: value[:1] for name, value in self._inputs.items()}
                seen = self._model(**one, **pixels)
        return [float(value) for value in self._centres @ seen.image_embeds[0]]

    def choose(self, image: Image) -> tuple[str, float]:
        """Return the category of an RGB image, or ``OTHER``, and the similarity of the nearest one."""
        values = self.similarities(image)
        best = max(range(len(values)), key=values.__getitem__)
        return (self._names[best] if values[best] >= LEAST_SIMILARITY else OTHER), values[best]
