"""What quantization leaves of a weight: the numbers that a model in 4 or 8 bits in fact computes with."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llavar_peft.errors import MissingDependencyError
from llavar_peft.weights.io.tensor_blocks import read_blocks, rows_per_block
from llavar_peft.weights.io.tensor_table import TensorEntry, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

# Of the language model's layers alone: tower, projector, embeddings and head are never quantized.
_ROUNDED = re.compile(r"^model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")


def is_rounded(name: str) -> bool:
    """Whether a tensor, by our name, is stored in few bits when the base is quantized."""
    return _ROUNDED.match(name) is not None


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a base was quantized in training.

    Attributes:
        kind: ``"nf4"`` with double quantization, or ``"int8"``.
        dtype: Of the weights before, and of the computation: torch's name.
    """

    kind: Literal["nf4", "int8"]
    dtype: str

    def __post_init__(self) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError.at(
                "onto=dequantized", "needs bitsandbytes, which is not installed", "pip install bitsandbytes"
            )

    def blocks(self, entry: TensorEntry) -> Iterator[Tensor]:
        """A linear layer's weight after it went through the quantization, which looks at it whole.

        Args:
            entry: Where it lies.

        Yields:
            Blocks of its rows, from first to last.
        """
        import torch

        whole = torch.empty(entry.shape, dtype=torch_dtype(self.dtype))
        start = 0
        for block in read_blocks(entry):
            whole[start : start + len(block)] = block
            start += len(block)
        rounded = self.applied(whole)
        del whole
        step = rows_per_block(entry.shape)
        for first in range(0, len(rounded), step):
            yield rounded[first : first + step]

    def applied(self, weight: Tensor) -> Tensor:
        """Quantizes a weight and brings it back.

        Args:
            weight: Shape (out, in).

        Returns:
            The same shape; computed by bitsandbytes, as it does in training.
        """
        functional: Any = importlib.import_module("bitsandbytes.functional")
        if self.kind == "nf4":
            stored, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            back: Tensor = functional.dequantize_4bit(stored, state)
            return back
        stored, scales, _ = functional.int8_vectorwise_quant(weight.half())  # it takes nothing else, in training either
        rounded: Tensor = functional.int8_vectorwise_dequant(stored, scales)
        return rounded
