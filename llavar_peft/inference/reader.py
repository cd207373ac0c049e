"""A model ready to be asked: from one of our folders, a released one, or an adapter's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.config import Attention, Dtype, ModelConfig, Quantization
from llavar_peft.data.images import open_image
from llavar_peft.errors import ConfigError
from llavar_peft.models.adapters import lay_adapter
from llavar_peft.models.build import build_model
from llavar_peft.models.fingerprints import check_base_of_adapter
from llavar_peft.models.processing import LlavarProcessor
from llavar_peft.models.reading import read_pictures
from llavar_peft.types import ImageMode
from llavar_peft.weights.adapter import ADAPTER_CONFIG, BASE_FILE, read_base_settings

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
        """Asks the same question about each picture.

        Args:
            images: Files or pictures; none asks without a picture.
            question: In plain words; nothing in it is ever a special token.
            max_new_tokens: Tokens at most for each answer.
            temperature: 0 is greedy; the original's ``run_llava`` uses 0.2.
            top_p: Share of the probability that is sampled from.
            seed: Makes sampling repeatable.
            image_mode: Overrides the model's own way of preparing pictures.

        Returns:
            One answer for each picture (or one, without).

        Raises:
            ImageError: A picture is missing or broken.
        """
        pictures: list[Image | None] = [open_image(image) for image in images] or [None]
        return read_pictures(
            self.model,
            self.processor,
            [question] * len(pictures),
            pictures,
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
    """Opens a model for asking.

    Args:
        model: A checkpoint's folder, ours or in the released layout; an adapter's, whose base is then opened; or a
            run's, which stands for its result.
        adapter: An adapter's folder, laid over ``model``.
        vision_tower: Where the tower is, for a checkpoint in the released layout.
        quantize: How the language model's linear layers are stored; None leaves an adapter's base as it was trained on.
        dtype: Of the weights.
        attention: Its implementation.
        device: None is a GPU where there is one, else the CPU.

    Returns:
        The model, ready.

    Raises:
        ConfigError: The folder holds no model, or names a base that is not there.
        WeightsError: Weights that do not fit.
    """
    import torch

    model = _inside_run(Path(model))
    if adapter is None and (model / ADAPTER_CONFIG).is_file():
        adapter = model
        base = _base_of(Path(adapter))
    else:
        base = ModelConfig(checkpoint=str(model), vision_tower=vision_tower)
    if quantize is None and adapter is not None:
        quantize = read_base_settings(Path(adapter)).get("quantize")
    config = dataclasses.replace(base, quantize=quantize, dtype=dtype, attention=attention)
    if adapter is not None:
        check_base_of_adapter(Path(adapter), config)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    built, processor = build_model(config, device=place)
    built.eval()
    return Reader(built if adapter is None else lay_adapter(built, Path(adapter)), processor)


def _inside_run(folder: Path) -> Path:
    """A run's folder stands for its result."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        for name in ("model", "adapter"):
            if (folder / name / "config.json").is_file():
                return folder / name
    return folder


def _base_of(adapter: Path) -> ModelConfig:
    settings = read_base_settings(adapter)
    if not settings:
        raise ConfigError.at(str(adapter / BASE_FILE), "no such file", "give the adapter's base as --model as well")
    base = ModelConfig(**settings)
    if base.checkpoint is None or Path(base.checkpoint).is_dir():
        return base
    # A run's folder may have been moved as a whole: the base then lies where it lay, seen from the adapter.
    old = Path(base.checkpoint)
    for moved in (adapter.parent / old.parent.name / old.name, adapter.parent / old.name):
        if moved.is_dir():
            return dataclasses.replace(base, checkpoint=str(moved))
    raise ConfigError.at(
        str(adapter / BASE_FILE), f"its base is not there (got {base.checkpoint!r})", "give the base as --model as well"
    )
