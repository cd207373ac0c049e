"""Attributes of bitsandbytes' layers that have no public counterpart."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_quantization_scales(model: nn.Module) -> None:
    """Keep the stored numbers and scales of quantized layers unchanged while the layers are used.

    Replaces: nothing public; bitsandbytes has no option for either behavior. Since: bitsandbytes 0.48, last seen in
    0.50.2.

    ``Linear4bit.support_avx512bf16_for_cpu``: on a CPU with AVX512-BF16, a layer in ``eval`` mode rewrites its weight
    for another kernel and rounds the scales to bfloat16. A run that generates between its steps would not be
    reproducible, and an adapter could not be merged onto the same numbers again.

    ``Int8Params.CB`` and ``SCB``: a weight on the CPU that is moved to the CPU counts as a new weight, whose scales
    ``Linear8bitLt`` expects in ``weight.SCB``, while those of a layer in use are in ``state.SCB``. peft's DoRA moves
    the weight in each forward pass (peft 0.21.2, ``peft/utils/integrations.py``, ``dequantize_module_weight``).
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def keep_state(layer: Any, _: Any) -> None:
        if layer.weight.CB is not None and layer.weight.SCB is None and layer.state.SCB is not None:
            layer.state.CB, layer.weight.CB = layer.weight.CB, None

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(keep_state)
        elif isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
