"""LLaVAR as a ``transformers`` model: stock LLaVA with a single linear layer, or two, as its projector.

The forward pass, with B conversations of T tokens, N images of P patches, tower width C and language model width D::

    pixel_values [N, 3, H, W] -> vision tower, hidden state -2 without the class token -> [N, P, C]
                              -> multi_modal_projector (one nn.Linear)                 -> [N, P, D]
    input_ids    [B, T]       -> embed_tokens                                          -> [B, T, D]
    splice: the rows of ``<im_patch>`` are replaced by the image features, in reading order over the batch
                              -> language_model -> [B, T, D] -> lm_head -> logits [B, T, V], or the loss

Shape suffixes: B batch, T tokens, N images, P patches of an image, F = N * P features, C tower width, D language model
width, V vocabulary, S supervised positions.

Source: LLaVAR, llava/model/llava.py, ``LlavaLlamaModel`` and ``LlavaLlamaForCausalLM``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from llavar_peft.compat.weight_conversion import tied_head
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.models.chunked_loss import LossHead, logits_factor
from llavar_peft.models.cross_attention_hooks import DETAIL, attach_cross_attention
from llavar_peft.models.detail_encoder import encoder_features, make_encoder
from llavar_peft.models.detail_features import (
    CROPS_AT_ONCE,
    ImageDetails,
    make_cross_attention,
    make_detail,
)
from llavar_peft.models.image_generation import GeneratesFromImages
from llavar_peft.models.llavar_config import LlavarConfig, count_needed_layers
from llavar_peft.models.missing_images import missing_projector_calls, zero_through_projector
from llavar_peft.models.pending_weights import PendingWeights
from llavar_peft.models.vision_tower import LlavarVisionTower, make_projector, tower_features, tower_layers
from llavar_peft.types import TileLayout

CACHE_ARGUMENT: Final = (
    "cache" if "cache" in signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"
)
"""The name of ``forward``'s argument for the key-value cache, which transformers 5.24 renamed."""
_PATCH_DIMENSIONS = 3
"""Number of dimensions of patch features; images have one more."""


class LlavarModel(LlavaModel):
    """Vision tower, projector and language model, without the language modeling head."""

    config: LlavarConfig
    config_class = LlavarConfig

    def __init__(self, config: LlavarConfig) -> None:
        super().__init__(config)
        if config.vision_config.model_type == "clip_vision_model":
            self.vision_tower = LlavarVisionTower(config.vision_config)
        self.multi_modal_projector = make_projector(
            config.projector_hidden_act, config.vision_config.hidden_size, config.text_config.hidden_size, config.tiles
        )
        self.detail_encoder = make_encoder(config)
        self.cross_attention = make_cross_attention(config)
        if self.cross_attention is not None:
            attach_cross_attention(self.language_model)
        self.post_init()
        if self.cross_attention is not None:
            self.cross_attention.reset_parameters()

    def forward(  # noqa: PLR0913, PLR0917 - the inputs of a transformers model
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_places: Tensor | None = None,
        image_layouts: Sequence[TileLayout] | Tensor | None = None,
        detail_values: Tensor | None = None,
        details: ImageDetails | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put the image features in the places of ``<im_patch>`` and run the language model.

        Args:
            input_ids: ``[B, T]``.
            pixel_values: ``[N, 3, H, W]`` or a sequence of ``[3, H, W]``, in reading order over the batch. With tiles,
                the views of all images one after the other. Or ``[N, P, C]`` from ``get_patch_features``.
            attention_mask: ``[B, T]``.
            position_ids: ``[B, T]``.
            inputs_embeds: ``[B, T, D]`` instead of ``input_ids``.
            vision_feature_layer: As in ``get_image_features``.
            vision_feature_select_strategy: As in ``get_image_features``.
            image_places: The positions of ``<im_patch>`` ``[F]``, counted over the batch in reading order. None
                searches them, for which the host waits for the device.
            image_layouts: With tiles, how each image is cut, ``[N, 4]``.
            detail_values: With cross-attention, the crops of each image ``[N, G, 3, S, S]``.
            details: With cross-attention, which tokens attend to which images. It gets the features of
                ``detail_values``, or has those that were computed before. None searches the images in padded rows, for
                which the host waits for the device.
            **kwargs: Passed to the language model, including the key-value cache (``CACHE_ARGUMENT``).

        Returns:
            The language model's output, with ``last_hidden_state`` ``[B, T, D]``.

        Raises:
            ValueError: Both or neither of ``input_ids`` and ``inputs_embeds`` are given, the number of ``<im_patch>``
                tokens differs from the number of image features, or the crops for the cross-attention are missing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward: expected exactly one of input_ids and inputs_embeds")
        in_training = self.training and torch.is_grad_enabled() and inputs_embeds is None
        # Calls on zeros, so that the projector has a gradient on every rank, also on one without images.
        missing_calls = missing_projector_calls(pixel_values) if in_training else 0
        embeds_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None:
            features_NPD = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_layouts=image_layouts,
            ).pooler_output
            features_FD = torch.cat(features_NPD).to(embeds_BTD.device, embeds_BTD.dtype)
            embeds_BTD = self._splice(input_ids, embeds_BTD, features_FD, image_places)
        for _ in range(missing_calls):
            embeds_BTD = embeds_BTD + zero_through_projector(self, through_tower=self._tower_is_trained())
        detail = make_detail(self, input_ids, embeds_BTD, detail_values, details, has_images=pixel_values is not None)
        if detail is not None:
            kwargs[DETAIL] = detail
        return super().forward(
            inputs_embeds=embeds_BTD, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embeddings, whatever it calls them."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embeddings."""
        self.language_model.set_input_embeddings(value)

    @torch.no_grad()
    def get_detail_features(self, detail_values: Tensor) -> list[Tensor]:
        """Run the second encoder, which is frozen: the tower on the crops of images, or another one.

        Args:
            detail_values: Crops ``[N, G, 3, S, S]``, or what another encoder takes.

        Returns:
            The features of each image ``[F, C]``; those of crops crop by crop, at the layer that is also projected.
        """
        if self.detail_encoder is not None:
            return encoder_features(self.detail_encoder, detail_values)
        layers, patch = self.num_tower_layers(), self.config.vision_config.patch_size
        patches = (detail_values.shape[-2] // patch) * (detail_values.shape[-1] // patch)
        features = [
            # The class token and register tokens come before the patches.
            tower_features(self.vision_tower, crops, layers)[:, -patches:]
            for crops in torch.split(detail_values.flatten(0, 1), CROPS_AT_ONCE)
        ]
        crops_XPC = torch.cat(features)  # X crops of all images
        return list(crops_XPC.reshape(len(detail_values), -1, crops_XPC.shape[-1]))

    def _splice(
        self, input_ids: Tensor | None, embeds_BTD: Tensor, features_FD: Tensor, places_F: Tensor | None
    ) -> Tensor:
        """Replace the embeddings of ``<im_patch>`` by image features."""
        if places_F is None:
            is_patch_BT1 = self.get_placeholder_mask(input_ids, inputs_embeds=embeds_BTD, image_features=features_FD)
            return embeds_BTD.masked_scatter(is_patch_BT1, features_FD)
        if len(places_F) != len(features_FD):
            raise ValueError(
                f"forward: got {len(places_F)} image tokens and {len(features_FD)} image features, expected as many"
            )
        return embeds_BTD.flatten(0, 1).index_copy(0, places_F, features_FD).view_as(embeds_BTD)

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_layouts: Sequence[TileLayout] | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the vision tower, up to the layer that is needed, and the projector.

        Args:
            pixel_values: Images of one size ``[N, 3, H, W]``, or (image mode ``keep``) a sequence of ``[3, H, W]``; or
                ``[N, P, C]`` from ``get_patch_features``, which are projected.
            vision_feature_layer: The hidden state that is projected; 0 is the embeddings, -1 the last layer's output.
                None is the configured one.
            vision_feature_select_strategy: ``"default"`` drops the class token and register tokens, ``"full"`` keeps
                everything. None is the configured one.
            image_layouts: With tiles, how each image is cut, ``[N, 4]``; ``pixel_values`` has the views of all images.
            **kwargs: Options of ``LlavaModel.get_image_features``, such as ``output_attentions``; with any of them the
                complete tower is run.

        Returns:
            ``pooler_output`` is a list of N projected features ``[P, D]`` (with tiles, of each image's own number of
            features), ``last_hidden_state`` the tower's hidden state (for a sequence of images, of those that are as
            large as the last one). The tower runs once for each size of image.

        Raises:
            ConfigError: The tower has no such hidden state.
            ValueError: The model has tiles and ``image_layouts`` is missing or does not fit, or it has no tiles.
        """
        layouts = self._checked_layouts(image_layouts)
        if not isinstance(pixel_values, Tensor):
            arguments = (vision_feature_layer, vision_feature_select_strategy)
            return self._features_by_size(
                pixel_values, lambda images: self.get_image_features(images, *arguments, **kwargs)
            )
        layers = self.num_tower_layers(vision_feature_layer)
        if kwargs and layouts is None:
            size = self.config.vision_config.image_size
            # CLIP's positions are learned for one size and interpolated for other sizes (image mode "keep").
            interpolate = tuple(pixel_values.shape[-2:]) != (size, size)
            return super().get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                interpolate_pos_encoding=interpolate,
                **kwargs,
            )
        if pixel_values.dim() == _PATCH_DIMENSIONS:
            hidden_NQC = hidden_NPC = pixel_values  # patch features that were computed before
        else:
            hidden_NQC, hidden_NPC = self._run_tower(pixel_values, layers, vision_feature_select_strategy)
        projected = self.multi_modal_projector(hidden_NPC, *([] if layouts is None else [layouts]))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_NQC, pooler_output=list(projected))

    @torch.no_grad()
    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """Return what is projected of images ``[N, 3, H, W]``, if the tower is not trained: ``[N, P, C]``."""
        return self._run_tower(pixel_values, self.num_tower_layers(), None)[1]

    def _run_tower(self, pixel_values: Tensor, layers: int, strategy: str | None) -> tuple[Tensor, Tensor]:
        """Return a hidden state of the tower ``[N, Q, C]``, and the part of it that is projected ``[N, P, C]``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tower_needs_gradients(pixel_values)):
            hidden_NQC = tower_features(self.vision_tower, pixel_values, layers)
        if (strategy or self.config.vision_feature_select_strategy) != "default":
            return hidden_NQC, hidden_NQC
        # The class token and register tokens come before the patches.
        rows, columns = (side // self.config.vision_config.patch_size for side in pixel_values.shape[-2:])
        return hidden_NQC, hidden_NQC[:, hidden_NQC.shape[1] - rows * columns :]

    def _checked_layouts(self, layouts: Sequence[TileLayout] | Tensor | None) -> Sequence[TileLayout] | None:
        """Return the layouts as a sequence. Raise ``ValueError`` if a model with tiles gets none."""
        if layouts is None:
            if self.config.resolution is not None and self.config.tiles is not None:
                raise ValueError("forward: got no image_layouts, expected them for a model with tiles")
            return None
        return layouts.tolist() if isinstance(layouts, Tensor) else layouts

    @staticmethod
    def _features_by_size(
        images: Sequence[Tensor], compute: Callable[[Tensor], BaseModelOutputWithPooling]
    ) -> BaseModelOutputWithPooling:
        """Compute the features of images of several sizes, all images of a size together."""
        indices_by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            indices_by_size.setdefault(tuple(image.shape), []).append(index)
        outputs: dict[tuple[int, ...], BaseModelOutputWithPooling] = {}
        features: dict[int, Tensor] = {}
        for size, indices in indices_by_size.items():
            outputs[size] = compute(torch.stack([images[index] for index in indices]))
            features.update(zip(indices, outputs[size].pooler_output, strict=True))
        last = outputs[tuple(images[-1].shape)]
        last.pooler_output = [features[index] for index in range(len(images))]
        return last

    def _tower_needs_gradients(self, pixel_values: Tensor) -> bool:
        """Return whether a gradient passes through the tower.

        With gradient checkpointing, ``transformers`` marks the output of the tower's embeddings as requiring one, also
        where the tower is frozen; it would then be computed twice more, in the backward pass.
        """
        return pixel_values.requires_grad or self._tower_is_trained()

    def train(self, mode: bool = True) -> LlavarModel:
        """Set the mode, in the tower of trained layers only: in training mode, DINOv3 shifts its positions."""
        super().train(mode)
        self.vision_tower.eval()
        if self.detail_encoder is not None:
            self.detail_encoder.eval()
        if self._tower_is_trained():
            tower_layers(self.vision_tower).train(mode)  # for the dropout of adapters, and to recompute activations
        return self

    def _tower_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def num_tower_layers(self, feature_layer: int | None = None) -> int:
        """Return the number of tower layers to compute for a hidden state; hidden state 0 is the embeddings.

        Args:
            feature_layer: The hidden state; None is the configured one.
        """
        hidden_state = self.config.vision_feature_layer if feature_layer is None else feature_layer
        return count_needed_layers(hidden_state, len(tower_layers(self.vision_tower)))


class LlavarForConditionalGeneration(GeneratesFromImages):
    """LLaVAR with its language modeling head.

    ``generate``, caches, attention backends, quantization and ``device_map`` are those of ``transformers``.
    """

    config: LlavarConfig
    config_class = LlavarConfig
    _tied_weights_keys = tied_head
    lm_head: nn.Linear
    pending_weights: PendingWeights | None = None
    """Set while parameters are on the device ``meta``, until their values are read (``build_pending_model``)."""

    def __init__(self, config: LlavarConfig) -> None:
        super().__init__(config)
        self.model = LlavarModel(config)
        text = config.text_config
        softcap = getattr(text, "final_logit_softcapping", None)
        self.lm_head = LossHead.of(self.lm_head, softcap, logits_factor(text), bias=config.lm_head_bias)
        self.post_init()

    def forward(  # noqa: PLR0913 - the inputs of a transformers model
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        *,
        supervised_places: Tensor | None = None,
        image_layouts: Sequence[TileLayout] | Tensor | None = None,
        detail_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, or with ``targets`` the loss without computing all logits.

        The first five arguments are those of ``LlavarModel.forward``.

        Args:
            labels: ``[B, T]``, for the loss of stock LLaVA.
            logits_to_keep: Positions whose logits are returned, as in ``LlavaForConditionalGeneration.forward``.
            targets: ``[B, T]``, the token to predict at each position; ``IGNORE_INDEX`` where there is none.
            supervised_places: The positions that have a token to predict ``[S]``, counted over the batch in reading
                order. None searches them, for which the host waits for the device.
            image_layouts: As in ``LlavarModel.forward``.
            detail_values: As in ``LlavarModel.forward``.
            **kwargs: Passed to ``LlavarModel.forward``, including the key-value cache (``CACHE_ARGUMENT``).

        Returns:
            The output of ``LlavaForConditionalGeneration``. With ``targets`` its ``loss`` is the summed cross entropy
            in float32 and ``logits`` is None; without a supervised position the loss is 0 and still depends on every
            trained parameter.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **({} if image_layouts is None else {"image_layouts": image_layouts}),
            **({} if detail_values is None else {"detail_values": detail_values}),
            **kwargs,
        }
        if targets is None:
            return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep)
        hidden_BTD = self.model(**inputs).last_hidden_state
        if supervised_places is None:
            supervised_places = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        if not len(supervised_places):
            zero = self.lm_head(hidden_BTD[0, :1], targets.new_zeros(1)) * 0.0
            return LlavaCausalLMOutputWithPast(loss=zero)
        hidden_SD = hidden_BTD.flatten(0, 1).index_select(0, supervised_places)
        loss = self.lm_head(hidden_SD, targets.flatten().index_select(0, supervised_places))
        return LlavaCausalLMOutputWithPast(loss=loss)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save under the modules' own names, also where the weights were loaded from the released layout.

        Args:
            save_directory: The folder.
            **kwargs: As in ``PreTrainedModel.save_pretrained``.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)
