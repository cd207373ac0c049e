"""The file that llama.cpp reads next to a language model: the vision tower and the projector.

llama.cpp computes two layers with a GELU between them. LLaVAR's single layer becomes two of this kind exactly, because
gelu(x) - gelu(-x) = x, whether the GELU is the exact one or its approximation by a hyperbolic tangent.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from packaging.version import InvalidVersion, Version

from llavar_peft.errors import ConfigError
from llavar_peft.models.llavar_config import count_needed_layers
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.weights.gguf.gguf_folder import GgufFile
from llavar_peft.weights.gguf.gguf_tensors import (
    OTHER_LAYOUT,
    GgufTensor,
    OutType,
    describe_file,
    import_gguf,
    matrix_type,
)
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.joined_rows import whole
from llavar_peft.weights.io.tensor_table import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_TOWERS: Final = ("clip_vision_model", "siglip_vision_model")
_GELUS: Final = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
"""Activations of a tower, and whether llama.cpp computes them by a hyperbolic tangent."""
_SCALE: Final = 256.0
"""llama.cpp computes GELU from -10 to 10 in float16 on a CPU, and copies other numbers: scaled, almost all are copied.
A power of two changes no digits; a larger one could exceed float16, in which some devices compute."""
_NOT_IN_FILE: Final = (".post_layernorm.", ".head.")
_ALWAYS_F32: Final = (".embeddings.",)
"""Their sizes are small, and the convolution of patches exists in few number formats."""
_LAYER: Final = ".encoder.layers."
_FEATURE_LAYER: Final = "clip.vision.feature_layer"
_ENGINE: Final = "llama-cpp-python"
_MISPLACES_UNTIL: Final = "0.3.36"
_MISPLACES: Final = (
    "llama.cpp puts CLIP's class token behind the patches, so that images are misread (ggml-org/llama.cpp#25814; the "
    f"fix #25844 is in no release up to that of llama-cpp-python {_MISPLACES_UNTIL})"
)


def projector_file(
    parts: ModelParts, tensors: Mapping[str, TensorEntry | Tensor], name: str, outtype: OutType
) -> GgufFile:
    """Return the file of a vision tower and a projector.

    Args:
        parts: The model.
        tensors: Where each tensor is stored, by our names.
        name: The model's name in the file.
        outtype: How the tower's matrices are stored.

    Raises:
        ConfigError: llama.cpp does not have this tower.
    """
    gguf, tower = import_gguf(), parts.config.vision_config
    side = parts.processor().image_side
    _check_tower(parts, side)
    needed = count_needed_layers(parts.config.vision_feature_layer, tower.num_hidden_layers)
    # The last layer that is computed is not the last of the file: older versions leave that one out, and know no
    # `feature_layer`.
    layers = min(needed + 1, tower.num_hidden_layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    found = []
    for ours, source in tensors.items():
        if not ours.startswith(tensor_names.TOWER) or any(part in ours for part in _NOT_IN_FILE):
            continue
        if _LAYER in ours and int(ours.partition(_LAYER)[2].partition(".")[0]) >= layers:
            continue
        stored = names.get_name(tensor_names.to_stock(ours), try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ConfigError.at("to", f"llama.cpp's vision tower has no tensor for {ours}", OTHER_LAYOUT)
        small = any(part in ours for part in _ALWAYS_F32)
        found.append(GgufTensor(stored, source, "F32" if small else matrix_type(tuple(source.shape), outtype)))
    found += _projector(parts, outtype)

    def describe(writer: Any) -> None:
        describe_file(writer, "MMPROJ", name, outtype)
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_projection_dim(parts.config.text_config.hidden_size)
        writer.add_vision_image_size(side)
        writer.add_vision_patch_size(tower.patch_size)
        writer.add_vision_embedding_length(tower.hidden_size)
        writer.add_vision_feed_forward_length(tower.intermediate_size)
        writer.add_vision_block_count(layers)
        writer.add_array(_FEATURE_LAYER, [needed])
        writer.add_vision_head_count(tower.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
        writer.add_vision_use_gelu(_GELUS[tower.hidden_act])
        writer.add_vision_image_mean(list(parts.image_processor.image_mean))
        writer.add_vision_image_std(list(parts.image_processor.image_std))

    return GgufFile(f"mmproj-{name}-{outtype}.gguf", "clip", describe, found)


def _check_tower(parts: ModelParts, side: int) -> None:
    """Reject what llama.cpp's LLaVA cannot compute."""
    config, tower = parts.config, parts.config.vision_config
    what = None
    if config.tiles is not None:
        what = "tiles are not written as GGUF (the model's resolution is tiles)"
    elif tower.model_type not in _TOWERS:
        what = f"llama.cpp's LLaVA does not have this vision tower (got {tower.model_type!r}, expected CLIP or SigLIP)"
    elif tower.hidden_act not in _GELUS:
        what = (
            f"llama.cpp does not have the tower's activation (got {tower.hidden_act!r}, expected {', '.join(_GELUS)})"
        )
    elif side != tower.image_size:
        what = f"llama.cpp prepares images of the tower's size (got {side} pixels, expected {tower.image_size})"
    if what is not None:
        raise ConfigError.at("to", what, OTHER_LAYOUT)
    if parts.inference_image_mode != "pad":
        logger.warning(
            "images will be padded with CLIP's mean color: llama.cpp does not support the mode %s",
            parts.inference_image_mode,
        )
    if tower.model_type == "clip_vision_model":
        logger.warning("%s. %s", _MISPLACES, _installed_engine())


def _installed_engine() -> str:
    """Return what is known about the llama.cpp that is installed."""
    try:
        found = importlib.metadata.version(_ENGINE)
        misplaces = Version(found) <= Version(_MISPLACES_UNTIL)
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return "Text is answered rightly; compare an answer about an image with that of `llavar-peft ask`"
    if misplaces:
        return f"The installed {_ENGINE} {found} is one of these"
    return f"The installed {_ENGINE} {found} is newer: compare an answer with that of `llavar-peft ask`"


def _projector(parts: ModelParts, outtype: OutType) -> list[GgufTensor]:
    read = {name: whole(one) for name, one in parts.tensors.items() if name.startswith(tensor_names.PROJECTOR)}
    if parts.config.projector_hidden_act != "linear":
        two = {
            f"mm.{number}.{part}": read[f"{tensor_names.STOCK_PROJECTOR}{layer}.{part}"]
            for number, layer in ((0, 1), (2, 2))
            for part in ("weight", "bias")
        }
        return [GgufTensor(name, one, matrix_type(one.shape, outtype)) for name, one in two.items()]
    weight, bias = (read[name].float() for name in (tensor_names.PROJECTOR_WEIGHT, tensor_names.PROJECTOR_BIAS))
    return [GgufTensor(name, one, "F32") for name, one in gelu_pair(weight, bias).items()]


def gelu_pair(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Write a linear map as two layers with a GELU between them.

    Args:
        weight: The projector's weight, float32 ``[D, C]``.
        bias: The projector's bias, float32 ``[D]``.

    Returns:
        Weights ``[2C, C]`` and ``[D, 2C]`` and biases, by llama.cpp's names.
    """
    import torch

    scaled = torch.eye(weight.shape[1]) * _SCALE
    return {
        "mm.0.weight": torch.cat([scaled, -scaled]),
        "mm.0.bias": torch.zeros(2 * weight.shape[1]),
        "mm.2.weight": torch.cat([weight, -weight], dim=1) / _SCALE,
        "mm.2.bias": bias.clone(),
    }
