"""One question about many images, through the library's own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.data.image_preparation import open_image
from llavar_peft.inference.open_engine import open_engine
from llavar_peft.models.generate import answer_images
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import Attention, Dtype, Quantization
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Reader:
    """A model and its processor.

    Attributes:
        model: In ``eval`` mode, on its device.
        processor: Its processor.
    """

    model: Any
    processor: LlavarProcessor

    def ask(
        self,
        images: Sequence[Image | str | Path],
        question: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        image_mode: ImageMode | None = None,
    ) -> list[str]:
        """Ask the same question about each image.

        Args:
            images: Files or images; none asks without an image.
            question: In plain words; nothing in it is ever a special token.
            max_new_tokens: Tokens at most for each answer.
            temperature: 0 is greedy; the original's ``run_llava`` uses 0.2.
            top_p: Share of the probability that is sampled from.
            seed: Makes sampling repeatable.
            image_mode: Overrides the model's own way of preparing images.

        Returns:
            One answer for each image (or one, without).

        Raises:
            ImageError: An image is missing or broken.
        """
        opened_images: list[Image | None] = [open_image(image) for image in images] or [None]
        return answer_images(
            self.model,
            self.processor,
            [question] * len(opened_images),
            opened_images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            image_mode=image_mode,
        )


def load_reader(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    vision_tower: str | None = None,
    quantize: Quantization | None = None,
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    device: str | None = None,
) -> Reader:
    """Open a model for asking.

    Args:
        model: A checkpoint's folder, ours or in the released layout; an adapter's, whose base is then opened; or a
            run's, which stands for its result.
        adapter: An adapter's folder, laid over ``model``.
        vision_tower: Where the tower is, for a checkpoint in the released layout.
        quantize: How the language model's linear layers are stored; None leaves an adapter's base as it was trained on.
        dtype: Of the weights.
        attention: Its implementation.
        device: As ``open_engine`` takes it; None is ``auto``.

    Returns:
        The model, ready.

    Raises:
        ConfigError: The folder holds no model, or names a base that is not there.
        WeightsError: Weights that do not fit.
    """
    engine = open_engine(
        model,
        {} if adapter is None else {"default": adapter},
        vision_tower=vision_tower,
        quantize=quantize,
        dtype=dtype,
        attention=attention,
        device=device or "auto",
    )
    return Reader(engine.model, engine.processor)
