"""Our one linear projector as stock LLaVA's two layers, and back.

``linear``     act is the identity: linear_1 = W, linear_2 = 1. For stock ``transformers``.
``two-sided``  act is ReLU: linear_1 = [1; -1], linear_2 = [W, -W], as relu(x) - relu(-x) = x to the last bit. For vLLM,
               whose table of activations (vllm/model_executor/layers/activation.py, ``_ACTIVATION_REGISTRY``, read in
               November 2026) has relu, gelu and others, and no ``linear``. Takes a language model at least twice as
               wide as the tower: LLaVAR's are 5120 and 1024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.weights.io import tensor_names

if TYPE_CHECKING:
    from torch import Tensor

ProjectorForm = Literal["linear", "two-sided"]
ACTIVATIONS: dict[str, str] = {"linear": "linear", "two-sided": "relu"}
"""``projector_hidden_act`` of each form."""
_PARTS = ("1.weight", "1.bias", "2.weight", "2.bias")


def to_two_layers(weight: Tensor, bias: Tensor, form: ProjectorForm) -> dict[str, Tensor]:
    """Write a linear map as two layers.

    Args:
        weight: The projector's, ``[D, C]``.
        bias: The projector's, ``[D]``.
        form: Which two.

    Returns:
        Four tensors by our names below ``STOCK_PROJECTOR``, in the projector's dtype.

    Raises:
        ConfigError: ``two-sided`` where D < 2 C.
    """
    import torch

    width, inner = weight.shape
    first, second = torch.zeros_like(weight), torch.zeros(width, width, dtype=weight.dtype)
    if form == "linear":
        first, second = weight.clone(), torch.eye(width, dtype=weight.dtype)
        biases = (bias.clone(), torch.zeros_like(bias))
    else:
        if width < 2 * inner:
            raise ConfigError.at(
                "projector",
                f"two-sided takes a language model twice as wide as the tower (got {width} and {inner})",
                "use the linear form",
            )
        one = torch.eye(inner, dtype=weight.dtype)
        first[:inner], first[inner : 2 * inner] = one, -one
        second[:, :inner], second[:, inner : 2 * inner] = weight, -weight
        biases = (torch.zeros_like(bias), bias.clone())
    values = (first, biases[0], second, biases[1])
    return {tensor_names.STOCK_PROJECTOR + part: value for part, value in zip(_PARTS, values, strict=True)}


def to_one_layer(tensors: Mapping[str, Tensor], activation: str, where: str) -> tuple[Tensor, Tensor]:
    """Take two layers back to the one that they were made from.

    Args:
        tensors: By our names, with four below ``STOCK_PROJECTOR``.
        activation: ``projector_hidden_act``.
        where: The folder, for the message.

    Returns:
        Weight ``[D, C]`` and bias ``[D]``, unchanged to the bit.

    Raises:
        WeightsError: A layer is missing, or the two are not one linear map in either form.
    """
    missing = [part for part in _PARTS if tensor_names.STOCK_PROJECTOR + part not in tensors]
    if missing:
        raise WeightsError.at(where, f"the projector lacks linear_{', linear_'.join(missing)}", "fetch the files again")
    stored = {part: tensors[tensor_names.STOCK_PROJECTOR + part] for part in _PARTS}
    inner = stored["1.weight"].shape[1]
    found = {
        "linear": (stored["1.weight"], stored["1.bias"]),
        "relu": (stored["2.weight"][:, :inner], stored["2.bias"]),
    }.get(activation)
    form = next((form for form, name in ACTIVATIONS.items() if name == activation), None)
    if found is not None and form is not None and found[0].shape[0] == found[1].shape[0]:
        again = to_two_layers(*found, form)  # type: ignore[arg-type]
        if all(stored[part].equal(again[tensor_names.STOCK_PROJECTOR + part]) for part in _PARTS):
            return found[0].contiguous(), found[1]
    raise WeightsError.at(
        where,
        f"a projector of two layers that is not one linear map (projector_hidden_act {activation!r})",
        "LLaVAR has a single linear layer; a LLaVA-1.5 stays with stock transformers",
    )
