"""The parts of a model before its language model: the vision tower and the projector.

Any vision transformer that ``AutoModel`` builds can be the tower, if its features form a grid of patches. CLIP's has a
class of its own.

Shape suffixes: N images, P patches of an image, Q positions of the tower (the patches, after a class token and register
tokens where the tower has them), C tower width, D language model width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from llavar_peft.errors import ConfigError
from llavar_peft.models.tile_features import arrange_tiles, pool_patches
from llavar_peft.recipe.resolution import Tiles
from llavar_peft.types import TileLayout


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


class _LayerReached(Exception):
    """Carries the input of the first layer that is not needed."""

    def __init__(self, hidden_NQC: Tensor) -> None:
        super().__init__()
        self.hidden_NQC = hidden_NQC


def tower_layers(tower: nn.Module) -> nn.ModuleList:
    """Return the layers of a vision tower.

    Raises:
        ConfigError: The tower is not a sequence of layers.
    """
    count = getattr(tower.config, "num_hidden_layers", None)
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError.at(
        "vision_tower",
        f"not a vision transformer (got {type(tower).__name__}, expected a sequence of num_hidden_layers layers)",
        "use a tower such as CLIP, SigLIP or DINOv2",
    )


def tower_features(tower: nn.Module, pixel_values: Tensor, num_layers: int) -> Tensor:
    """Return the hidden state of a vision tower after some of its layers; the others are not computed.

    Args:
        tower: CLIP's or another tower.
        pixel_values: ``[N, 3, H, W]``. A size that is not the tower's own needs positions that can be interpolated.
        num_layers: Number of layers to compute.

    Returns:
        ``[N, Q, C]``.
    """
    side = getattr(tower.config, "image_size", None)
    other_size = tuple(pixel_values.shape[-2:]) != (side, side)
    if isinstance(tower, LlavarVisionTower):
        output = tower(pixel_values, interpolate_pos_encoding=other_size, num_layers=num_layers)
        hidden_NQC: Tensor = output.last_hidden_state
        return hidden_NQC
    pixel_values = pixel_values.to(next(tower.parameters()).dtype)  # AIMv2 does not convert them itself
    takes_sizes = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    options = {"interpolate_pos_encoding": True} if takes_sizes and other_size else {}
    layers = tower_layers(tower)
    if num_layers == len(layers):
        return _last_output(tower, layers[-1], pixel_values, options)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _LayerReached(args[0] if args else kwargs["hidden_states"])

    # Before the hooks of sharded training, which would gather the weights of the layer.
    handle = layers[num_layers].register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        tower(pixel_values, **options)
    except _LayerReached as reached:
        return reached.hidden_NQC
    finally:
        handle.remove()
    raise ConfigError.at(
        "vision_tower", f"{type(tower).__name__} does not call its layers in order", "use another tower"
    )


def _last_output(tower: nn.Module, layer: nn.Module, pixel_values: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the output of a tower's last layer, before any norm."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(keep)
    try:
        tower(pixel_values, **options)
    finally:
        handle.remove()
    return found[0]


def make_projector(activation: str, width_in: int, width_out: int, tiles: Tiles | None = None) -> ImageProjector:
    """Return an untrained projector.

    Args:
        activation: ``"linear"`` for a single linear layer; otherwise the activation between two layers.
        width_in: Width of the tower.
        width_out: Width of the language model.
        tiles: How images are cut into tiles; the projector then has the embedding that ends their rows.
    """
    projector: ImageProjector
    if activation == "linear":
        projector = LinearProjector(width_in, width_out)
    else:
        projector = MlpProjector(activation, width_in, width_out)
    if tiles is not None:
        projector.pool = tiles.pool
        projector.image_newline = nn.Parameter(torch.randn(width_out) * width_out**-0.5)
    return projector


class ImageProjector(nn.Module, ABC):
    """What every projector does: project patches, and with tiles pool them first and join the views of each image.

    Attributes:
        pool: Number of patches, in each direction, that are averaged.
        image_newline: Ends each row of a tiled image's patches ``[D]``; None for a model without tiles.
    """

    pool: int = 1
    image_newline: nn.Parameter | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_parameter("image_newline", None)

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Return the projected features ``[..., D]`` of features ``[..., C]``."""

    def forward(self, features: Tensor, layouts: Sequence[TileLayout] | None = None) -> Any:
        """Project features.

        Args:
            features: ``[..., C]``, with layouts those of all views ``[V, P, C]``.
            layouts: How each image is cut into tiles; None for a model without tiles.

        Returns:
            The projected features ``[..., D]``; with layouts a list with those of each image ``[F, D]``.

        Raises:
            ValueError: The model has no tiles, or the views are not those of the layouts.
        """
        if layouts is None:
            return self.project(features)
        if self.image_newline is None:
            raise ValueError("forward: got image_layouts, expected none for a model without tiles")
        return arrange_tiles(self.project(pool_patches(features, self.pool)), layouts, self.image_newline)


class LinearProjector(ImageProjector, nn.Linear):
    """The projector, which computes in the dtype of its weights, except under autocast.

    A tower that is not trained may be in half precision while the trained projector is in float32. In a training step
    autocast decides on the dtype; decoding and evaluation also call the model without it.
    """

    def project(self, features: Tensor) -> Tensor:
        """Return the projected features ``[..., D]`` of features ``[..., C]``."""
        if features.dtype != self.weight.dtype and not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.weight.dtype)
        return nn.functional.linear(features, self.weight, self.bias)


class MlpProjector(ImageProjector):
    """A projector of two linear layers, with the names and the values of stock LLaVA's.

    Args:
        activation: Name of the activation between the layers in ``transformers``.
        width_in: Width of the tower.
        width_out: Width of the language model.

    Source: LLaVA-1.5 (arXiv 2310.03744), ``mlp2x_gelu``.
    """

    def __init__(self, activation: str, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear_1 = LinearProjector(width_in, width_out)
        self.act = ACT2FN[activation]
        self.linear_2 = LinearProjector(width_out, width_out)

    def project(self, features: Tensor) -> Tensor:
        """Return the projected features ``[..., D]`` of features ``[..., C]``."""
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected
