"""``generate`` of transformers for a LLaVAR: with images that have tiles, or crops for the cross-attention.

This package's own answers come from ``llavar_peft.inference``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llavar_peft.models.detail_features import ImageDetails, find_segments


class GeneratesFromImages(LlavaForConditionalGeneration):
    """Stock LLaVA whose ``generate`` knows tiles and crops."""

    _generated: tuple[Tensor, list[Tensor]] | None = None
    """The crops of the call of ``generate`` that is running, and their features."""

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as ``transformers`` does, with tiles one sequence for each prompt.

        Args:
            inputs: The prompts' ids.
            generation_config: As the other arguments, those of ``GenerationMixin.generate``.
            *args: The following ones.
            **kwargs: By their names.

        Raises:
            ValueError: Several sequences are asked for: ``transformers`` repeats tensors row by row, and an image with
                tiles has several rows.
        """
        settings = generation_config or self.generation_config
        for name in ("num_beams", "num_return_sequences"):
            count = kwargs.get(name, getattr(settings, name)) or 1
            if count > 1 and kwargs.get("image_layouts") is not None:
                raise ValueError(f"generate: got {name}={count}, expected 1 with tiles (repeat the prompt instead)")
        try:
            return super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            self._generated = None

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of a step of ``generate``; the features of the crops are computed in the first one.

        Args:
            input_ids: All tokens so far ``[B, T]``.
            *args: As in ``LlavaForConditionalGeneration.prepare_inputs_for_generation``.
            **kwargs: The same.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        crops = inputs.pop("detail_values", None)
        if crops is None:
            return inputs
        if self._generated is None or self._generated[0] is not crops:
            self._generated = crops, self.model.get_detail_features(crops)
        computed = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
        segments = find_segments(input_ids, self.config, images=len(crops), last=computed.shape[1])
        return {**inputs, "details": ImageDetails(segments, self._generated[1])}
