"""Quantized layers on fake tensors: the sizes of bitsandbytes' layers, and the tensors that its functions keep.

bitsandbytes' operations have no memory on fake tensors, and its CUDA kernels hide the weights that they decompress.
These layers allocate what its functions allocate on a GPU.

Source: bitsandbytes 0.50.2, ``autograd/_functions.py`` (``MatMul4Bit``, ``MatMul8bitLt``), ``backends/cuda/ops.py``
(``gemm_4bit`` decompresses the weight for more than 1,536 rows).
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from llavar_peft.recipe.schema import Quantization

_BLOCK, _NESTED_BLOCK = 64, 256


class _Matmul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Any, weight: Tensor) -> Tensor:
        ctx.layer, ctx.weight = layer, weight
        return nn.functional.linear(input, layer.decompress(weight, input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.decompress(ctx.weight, grad.dtype), None, None


class FakeLinear4bit(bnb.nn.Linear4bit):
    """A layer whose weight has the size of an nf4 weight with double quantization.

    Args:
        layer: The layer that it replaces.
        storage: Dtype of the packed weight; FSDP can shard only floating ones.
    """

    def __init__(self, layer: nn.Linear, storage: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        numbers = layer.weight.numel()
        packed = torch.empty(numbers // (2 * storage.itemsize), 1, dtype=storage, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"  # read by peft
        self.compute_dtype = torch.bfloat16
        self.register_buffer("absmax", torch.empty(numbers // _BLOCK, dtype=torch.uint8, device="meta"))
        nested = numbers // (_BLOCK * _NESTED_BLOCK)
        self.register_buffer("nested_absmax", torch.empty(nested, dtype=torch.float32, device="meta"))

    def decompress(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight ``[out, in]``, by way of its scales in float32."""
        scales = self.absmax.float()
        scales += 1.0
        return weight.new_empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply as bitsandbytes does."""
        output = _Matmul4Bit.apply(x.to(self.compute_dtype), self, self.weight)
        return (output if self.bias is None else output + self.bias).to(x.dtype)


class _Matmul8Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        ctx.tensors = (None, None, input)  # on the context itself, as bitsandbytes keeps it
        half = input.to(torch.float16)
        half.to(torch.int8)
        return input.new_empty(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


class FakeLinear8bitLt(bnb.nn.Linear8bitLt):
    """A layer whose weight has one byte per number, and a scale per row."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("SCB", torch.empty(layer.out_features, dtype=torch.float32, device="meta"))
        self.state = bnb.MatmulLtState()  # peft reads its settings
        self.state.has_fp16_weights, self.index = False, None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply as bitsandbytes does on a GPU."""
        output = _Matmul8Bit.apply(x, self)
        return output if self.bias is None else output + self.bias


def quantize_layers(model: nn.Module, quantize: Quantization, *, sharded: bool) -> None:
    """Replace the language model's linear layers, on the meta device, as ``from_pretrained`` does.

    Args:
        model: Changed in place.
        quantize: The format.
        sharded: Whether nf4 weights are stored in a dtype that FSDP can shard.
    """
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if "language_model.layers." in name and isinstance(module, nn.Linear):
            storage = torch.bfloat16 if sharded else torch.uint8
            fake = FakeLinear4bit(module, storage) if quantize == "nf4" else FakeLinear8bitLt(module)
            model.get_submodule(parent).set_submodule(last, fake)
    # Read by peft, which chooses its layers by them.
    model.is_quantized = True
    setattr(model, "is_loaded_in_4bit" if quantize == "nf4" else "is_loaded_in_8bit", True)
