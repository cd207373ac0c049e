"""The cross entropy of a language modelling head without its logits: in chunks, each chunk's gradient taken at once.

Logits of N positions over V pieces, in float32 and with their gradient, take 8 N V bytes: 2 GiB for 8 conversations of
LLaVAR-13B. Here no more than a chunk of them is ever there, and nothing is computed twice.

Source of the idea: liger-kernel (arXiv 2410.10989), fused linear cross entropy; this is plain PyTorch, on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 1024
"""Positions whose logits are there at once: 125 MiB of float32 at 32,003 pieces."""


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        of_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        # Summed in float32: with many chunks, half precision would lose the small ones.
        of_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        cast_VD = weight_VD.to(hidden_ND.dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            logits_nV = nn.functional.linear(hidden_ND[part], cast_VD).float()
            norm_n1 = logits_nV.logsumexp(dim=1, keepdim=True)
            total += (norm_n1 - logits_nV.gather(1, targets_N[part, None])).sum()
            if not (wants_hidden or wants_weight):
                continue
            # The gradient takes the logits' place: probabilities, less one at the target.
            slope_nV = logits_nV.sub_(norm_n1).exp_()
            slope_nV.scatter_add_(1, targets_N[part, None], torch.full_like(norm_n1, -1.0))
            slope_nV = slope_nV.to(hidden_ND.dtype)
            if of_hidden_ND is not None:
                of_hidden_ND[part] = slope_nV @ cast_VD
            if of_weight_VD is not None:
                of_weight_VD += slope_nV.T @ hidden_ND[part]
        ctx.save_for_backward(of_hidden_ND, of_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden_ND, of_weight_VD = ctx.saved_tensors
        return (
            None if of_hidden_ND is None else of_hidden_ND * factor.to(of_hidden_ND.dtype),
            None if of_weight_VD is None else of_weight_VD.mul_(factor).to(ctx.weight_dtype),
            None,
            None,
        )


def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Sums the cross entropy of a linear head's logits.

    Args:
        hidden_ND: The last hidden states ``[N, D]``.
        weight_VD: The head's weight ``[V, D]``.
        targets_N: The right pieces ``[N]``, none ignored.
        chunk: Positions whose logits are made at once.

    Returns:
        The sum in float32. Its gradient is that of ``cross_entropy(linear(hidden, weight).float(), targets)``; under
        autocast the head is computed in autocast's dtype, as a layer would be.
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        total: Tensor = _SummedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk)  # type: ignore[no-untyped-call]
    return total


class LossHead(nn.Linear):
    """A language modelling head that can give the loss instead of logits.

    As a call of the module, not of its weight: whoever keeps a shard of it gathers it when it is called.
    """

    @classmethod
    def of(cls, head: nn.Linear) -> LossHead:
        """A head around the same parameter.

        Args:
            head: Without bias.

        Returns:
            The head.
        """
        made = cls(head.in_features, head.out_features, bias=False, device="meta")
        made.weight = head.weight
        return made

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the summed cross entropy.

        Args:
            input: Hidden states ``[..., D]``; with ``targets`` ``[N, D]``.
            targets: The right pieces ``[N]``.

        Returns:
            ``[..., V]``, or the sum in float32.
        """
        return super().forward(input) if targets is None else summed_cross_entropy(input, self.weight, targets)
