"""A model, its processor, and the adapters over it, of which one at a time is on, or none.

Shape suffixes: P patches of an image, D language model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llavar_peft.errors import ConfigError
from llavar_peft.inference.generation_request import PromptImage

if TYPE_CHECKING:
    from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
    from llavar_peft.models.processing_llavar import LlavarProcessor


class Engine:
    """What decoding runs on.

    Args:
        model: A LLaVAR, or a ``PeftModel`` around one; in ``eval`` mode, on its device.
        processor: Its processor.
        adapters: The name of each adapter, by its name within the ``PeftModel`` (where a name is less free); None takes
            the latter.

    Attributes:
        model: As given.
        processor: As given.
        adapters: The adapters' names.
    """

    def __init__(self, model: Any, processor: LlavarProcessor, adapters: dict[str, str] | None = None) -> None:
        self.model = model
        self.processor = processor
        inner = list(model.peft_config) if hasattr(model, "peft_config") else []
        self._inner = {outer: name for name, outer in (adapters or dict(zip(inner, inner, strict=True))).items()}
        self._active: str | None = None
        if inner:
            self._switch_on(self.adapters[0])

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters' names, in the order they were given."""
        return tuple(self._inner)

    @property
    def plain(self) -> LlavarForConditionalGeneration:
        """The LLaVAR itself; the adapters are within its layers."""
        model: LlavarForConditionalGeneration = self.model.get_base_model() if self._inner else self.model
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.plain.get_input_embeddings().weight.device
        return device

    @property
    def context(self) -> int:
        """Positions that the language model was made for."""
        return int(self.plain.config.text_config.max_position_embeddings)

    def check_adapter(self, name: str | None) -> None:
        """Raise ``ConfigError`` if there is no such adapter. None, the base, is always there."""
        if name is not None and name not in self._inner:
            there = ", ".join(self._inner) or "none"
            raise ConfigError.at("adapter", f"there is no {name!r} (there are: {there})", "name one of these")

    def use(self, adapter: str | None) -> None:
        """Switches to an adapter: its layers, its projector, its rows.

        Args:
            adapter: Its name, None for the base.

        Raises:
            ConfigError: There is no such adapter.
        """
        self.check_adapter(adapter)
        if adapter == self._active:
            return
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
            self._active = None
        else:
            self._switch_on(adapter)

    def _switch_on(self, adapter: str) -> None:
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(self._inner[adapter], inference_mode=True)
        self._active = adapter

    @torch.inference_mode()
    def look(self, images: Sequence[PromptImage], adapter: str | None) -> None:
        """Run tower and projector on the images that this adapter has not looked at; fills their ``features``.

        Args:
            images: Of any sizes; those of one size go through together.
            adapter: Whose projector it is.
        """
        self.use(adapter)
        waiting = {id(image): image for image in images if adapter not in image.features}
        by_size: dict[tuple[int, ...], list[PromptImage]] = {}
        for image in waiting.values():
            by_size.setdefault(tuple(image.pixels.shape), []).append(image)
        for alike in by_size.values():
            pixels = torch.stack([image.pixels for image in alike]).to(self.device)
            features: list[Tensor] = self.plain.model.get_image_features(pixels).pooler_output
            for image, features_PD in zip(alike, features, strict=True):
                image.features[adapter] = features_PD
