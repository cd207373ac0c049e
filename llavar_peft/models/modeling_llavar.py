"""LLaVAR as a ``transformers`` model: stock LLaVA with ONE linear projector.

Shape suffixes: B batch, T tokens, N images, P patches of an image, C tower width, D language model width.

Source: LLaVAR, llava/model/llava.py, ``LlavaLlamaModel`` and ``LlavaLlamaForCausalLM``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.models.chunked_loss import LossHead
from llavar_peft.models.llavar_config import LlavarConfig

CACHE_ARGUMENT: Final = (
    "cache" if "cache" in signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"
)
"""What ``forward`` calls the cache of keys and values: transformers 5.24 gave it another name."""


class UnusedCLIPEncoderLayer(CLIPEncoderLayer):
    """A layer of the tower behind the one whose output is projected: kept, saved, and passed by."""

    def forward(self, hidden_states: Tensor, *args: Any, skip_unused_layers: bool = False, **kwargs: Any) -> Tensor:
        """Compute the layer, unless told that nobody looks at it.

        Args:
            hidden_states: ``[N, 1 + P, C]``.
            *args: As the parent's.
            skip_unused_layers: Whether to give back what came.
            **kwargs: As the parent's.

        Returns:
            ``[N, 1 + P, C]``.
        """
        if skip_unused_layers:
            return hidden_states
        computed: Tensor = super().forward(hidden_states, *args, **kwargs)
        return computed


def _layers_needed(feature_layer: int | Sequence[int], layers: int) -> int:
    """How many layers the hidden states that are projected take; the first of these states is the embeddings."""
    chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)


class LlavarModel(LlavaModel):
    """Tower, linear projector and language model, without the head."""

    config: LlavarConfig
    config_class = LlavarConfig

    def __init__(self, config: LlavarConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        layers = self.vision_tower.encoder.layers
        for layer in layers[_layers_needed(config.vision_feature_layer, len(layers)) :]:
            layer.__class__ = UnusedCLIPEncoderLayer
        self.post_init()

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], **kwargs: Any) -> BaseModelOutputWithPooling:
        """Run tower and projector.

        Args:
            pixel_values: Images of one size ``[N, 3, H, W]``, or (mode ``keep``) a sequence of ``[3, H, W]``.
            **kwargs: What the parent's method takes.

        Returns:
            The tower's output whose ``pooler_output`` is a list of N projected features ``[P, D]``.
        """
        if isinstance(pixel_values, Tensor):
            size = self.config.vision_config.image_size
            # CLIP's positions are learnt for one size; other sizes (mode "keep") interpolate them.
            interpolate = tuple(pixel_values.shape[-2:]) != (size, size)
            return super().get_image_features(
                pixel_values, interpolate_pos_encoding=interpolate, skip_unused_layers=True, **kwargs
            )
        outputs = [self.get_image_features(image[None], **kwargs) for image in pixel_values]
        merged = outputs[-1]
        merged.pooler_output = [features_PD for output in outputs for features_PD in output.pooler_output]
        return merged

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Splices the images' features in at ``<im_patch>`` and runs the language model.

        In training, a batch without an image still passes (times zero) through the projector, as in the original: on
        several ranks its gradient must exist everywhere.

        Args:
            input_ids: ``[B, T]``.
            pixel_values: ``[N, 3, H, W]`` or a sequence of ``[3, H, W]``, in reading order over the batch.
            attention_mask: ``[B, T]``.
            position_ids: ``[B, T]``.
            inputs_embeds: ``[B, T, D]`` instead of ``input_ids``.
            **kwargs: What the parent's ``forward`` takes, the cache among it (``CACHE_ARGUMENT``).

        Returns:
            The parent's output.
        """
        if self.training and torch.is_grad_enabled() and pixel_values is None and inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids) + self._no_image()
            input_ids = None
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _no_image(self) -> Tensor:
        parameter = next(self.multi_modal_projector.parameters())
        if hasattr(parameter, "ds_id"):
            # ZeRO-3 gathers a module's weights as it is called: ranks in different modules would wait for one another.
            size, tower = self.config.vision_config.image_size, next(self.vision_tower.parameters())
            black_13HW = torch.zeros(1, 3, size, size, dtype=tower.dtype, device=tower.device)
            features: Tensor = self.get_image_features(black_13HW).pooler_output[0]
            return features.sum() * 0.0
        nothing_1C = torch.zeros(
            1, self.config.vision_config.hidden_size, dtype=parameter.dtype, device=parameter.device
        )
        projected: Tensor = self.multi_modal_projector(nothing_1C)
        return projected.sum() * 0.0


class LlavarForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVAR with its language modelling head.

    ``generate``, caches, attention backends, quantization and ``device_map`` are the library's own.
    """

    config: LlavarConfig
    config_class = LlavarConfig
    lm_head: nn.Linear

    def __init__(self, config: LlavarConfig) -> None:
        super().__init__(config)
        self.model = LlavarModel(config)
        self.lm_head = LossHead.of(self.lm_head)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's, or, with ``targets``, the loss without logits.

        Args:
            input_ids: ``[B, T]``.
            pixel_values: ``[N, 3, H, W]`` or a sequence of ``[3, H, W]``, in reading order over the batch.
            attention_mask: ``[B, T]``.
            position_ids: ``[B, T]``.
            inputs_embeds: ``[B, T, D]`` instead of ``input_ids``.
            labels: ``[B, T]``, for the parent's loss.
            logits_to_keep: Positions whose logits are wanted.
            targets: ``[B, T]``, what each position has to predict; ``IGNORE_INDEX`` where nothing.
            **kwargs: What the parent's ``forward`` takes, the cache among it (``CACHE_ARGUMENT``).

        Returns:
            The parent's output. With ``targets`` its ``loss`` is the summed cross entropy in float32, and ``logits`` is
            None; without a supervised position it is 0 and still hangs on every trained parameter.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if targets is None:
            return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep)
        hidden_BTD = self.model(**inputs).last_hidden_state
        supervised_BT = targets != IGNORE_INDEX
        if not supervised_BT.any():
            nothing = self.lm_head(hidden_BTD[0, :1], targets.new_zeros(1)) * 0.0
            return LlavaCausalLMOutputWithPast(loss=nothing)
        return LlavaCausalLMOutputWithPast(loss=self.lm_head(hidden_BTD[supervised_BT], targets[supervised_BT]))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save under the names the modules have, also where the weights came in the released layout.

        Args:
            save_directory: The folder.
            **kwargs: What ``PreTrainedModel.save_pretrained`` takes.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)
