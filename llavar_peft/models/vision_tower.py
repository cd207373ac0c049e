"""The parts of LLaVAR before its language model: CLIP's vision tower and the linear projector.

Shape suffixes: N images, P patches of an image, C tower width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings


class LlavarVisionEmbeddings(CLIPVisionEmbeddings):
    """CLIP's embeddings, which call the same modules for every image size, as ZeRO-3 requires of all ranks."""

    @classmethod
    def of(cls, embeddings: CLIPVisionEmbeddings) -> LlavarVisionEmbeddings:
        """Return embeddings that share the parameters of others."""
        with torch.device("meta"):
            made = cls(embeddings.config)
        made.class_embedding, made.position_ids = embeddings.class_embedding, embeddings.position_ids
        made.patch_embedding, made.position_embedding = embeddings.patch_embedding, embeddings.position_embedding
        return made

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Return the positions ``[1, 1 + P, C]`` of an image, from the learned ones by bicubic interpolation.

        The same numbers as CLIP's, which reads the weight without calling its module.

        Args:
            embeddings: ``[N, 1 + P, C]``; not used.
            height: In pixels.
            width: In pixels.
        """
        learned_1QC = self.position_embedding(self.position_ids)
        side = self.image_size // self.patch_size
        grid_1CSS = learned_1QC[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        size = (height // self.patch_size, width // self.patch_size)
        grid_1CHW = nn.functional.interpolate(grid_1CSS, size=size, mode="bicubic", align_corners=False)
        return torch.cat((learned_1QC[:, :1], grid_1CHW.flatten(2).transpose(1, 2)), dim=1)


class LlavarVisionTower(CLIPVisionModel):
    """CLIP's vision tower, which can stop at the layer whose output is projected.

    All layers keep their weights, so that checkpoints and exports hold the complete tower.
    """

    embeddings: CLIPVisionEmbeddings

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = LlavarVisionEmbeddings.of(self.embeddings)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        num_layers: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the tower.

        Args:
            pixel_values: ``[N, 3, H, W]``.
            interpolate_pos_encoding: Whether the images have another size than the tower's.
            num_layers: Number of layers to compute; None computes all of them, as CLIP does.
            **kwargs: Passed to ``CLIPVisionModel.forward`` when all layers are computed.

        Returns:
            With ``num_layers``, the hidden state ``[N, 1 + P, C]`` after that many layers as ``last_hidden_state``;
            otherwise CLIP's output.
        """
        if num_layers is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        hidden_N1C = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_N1C = self.pre_layrnorm(hidden_N1C)
        for layer in self.encoder.layers[:num_layers]:
            hidden_N1C = layer(hidden_N1C, None)  # no attention mask: every patch sees every other
        return BaseModelOutputWithPooling(last_hidden_state=hidden_N1C)


class LinearProjector(nn.Linear):
    """The projector, which computes in the dtype of its weights, except under autocast.

    A tower that is not trained may be in half precision while the trained projector is in float32. In a training step
    autocast decides on the dtype; decoding and evaluation also call the model without it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the projected features ``[..., D]`` of features ``[..., C]``."""
        if input.dtype != self.weight.dtype and not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.weight.dtype)
        return super().forward(input)
