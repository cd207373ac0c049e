"""The cross entropy of a language modeling head, computed in chunks, so that not all logits are in memory at once.

Logits of N positions over V tokens, in float32 and with their gradient, take 8 N V bytes: 2 GiB for 8 conversations of
LLaVAR-13B. Here only one chunk of them exists at a time. Its gradient is computed in the same step, so that nothing is
computed twice.

Source of the idea: liger-kernel (arXiv 2410.10989), fused linear cross entropy; this is plain PyTorch, on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_DIVISOR = "logits_scaling"
SCALED_LOGITS = (_DIVISOR, "logit_scale", "logits_scale", "lm_head_multiplier")
"""Settings that scale a language model's logits. Whether they do it as here is found out when the model is read."""

CHUNK = 1024
"""Number of positions whose logits exist at the same time: 125 MiB of float32 at 32,003 tokens."""


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk: int,
        softcap: float | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # Summed in float32: over many chunks, half precision would lose small contributions.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        cast_VD, cast_V = weight_VD.to(hidden_ND.dtype), None if bias_V is None else bias_V.to(hidden_ND.dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            logits_nV = cap_logits(nn.functional.linear(hidden_ND[part], cast_VD, cast_V).float(), softcap)
            slope_nV = None if softcap is None else 1 - (logits_nV / softcap) ** 2
            norm_n1 = logits_nV.logsumexp(dim=1, keepdim=True)
            total += (norm_n1 - logits_nV.gather(1, targets_N[part, None])).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # The gradient overwrites the logits: probabilities, less one at the target.
            grad_nV = logits_nV.sub_(norm_n1).exp_()
            grad_nV.scatter_add_(1, targets_N[part, None], torch.full_like(norm_n1, -1.0))
            grad_nV = (grad_nV if slope_nV is None else grad_nV.mul_(slope_nV)).to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = grad_nV @ cast_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_nV.T @ hidden_ND[part]
            if grad_bias_V is not None:
                grad_bias_V += grad_nV.sum(dim=0, dtype=torch.float32)
            # Otherwise the next chunk's logits would be computed beside this one's.
            del logits_nV, grad_nV, slope_nV
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        return (
            None if grad_hidden_ND is None else grad_hidden_ND * factor.to(grad_hidden_ND.dtype),
            None if grad_weight_VD is None else grad_weight_VD.mul_(factor).to(ctx.weight_dtype),
            None if grad_bias_V is None else grad_bias_V.mul_(factor).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def logits_factor(text_config: Any) -> float | None:
    """Return the factor by which a language model multiplies its logits, as Granite and Cohere do; or None."""
    for name in SCALED_LOGITS:
        value = getattr(text_config, name, None)
        if value not in (None, 1, 1.0):
            return 1 / float(value) if name == _DIVISOR else float(value)
    return None


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits limited to a range by a hyperbolic tangent, as in Gemma 2; None leaves them unchanged."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def summed_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk: int = CHUNK,
    softcap: float | None = None,
) -> Tensor:
    """Return the summed cross entropy of a linear head's logits.

    Args:
        hidden_ND: The last hidden states ``[N, D]``.
        weight_VD: The head's weight ``[V, D]``.
        targets_N: The tokens to predict ``[N]``, none of them ignored.
        bias_V: The head's bias ``[V]``, which few language models have.
        chunk: Number of positions whose logits are computed at once.
        softcap: Limit of the logits, see ``cap_logits``.

    Returns:
        The sum in float32. Its gradient is that of ``cross_entropy(linear(hidden, weight).float(), targets)``. Under
        autocast the head is computed in autocast's dtype, as a layer would be.
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        total: Tensor = _SummedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, chunk, softcap)  # type: ignore[no-untyped-call]
    return total


class LossHead(nn.Linear):
    """A language modeling head that can return the loss instead of logits.

    The loss is a call of the module rather than a use of its weight, because sharded training gathers a module's weight
    when the module is called.
    """

    softcap: float | None = None
    factor: float | None = None

    @classmethod
    def of(
        cls, head: nn.Linear, softcap: float | None = None, factor: float | None = None, *, bias: bool = False
    ) -> LossHead:
        """Return a head that shares the parameter of another head without bias.

        Args:
            head: The other head.
            softcap: Limit of the logits, see ``cap_logits``.
            factor: See ``logits_factor``.
            bias: Whether it gets a bias, of zeros.
        """
        made = cls(head.in_features, head.out_features, bias=False, device="meta")
        made.weight, made.softcap, made.factor = head.weight, softcap, factor
        if bias:
            made.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))
        return made

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits ``[..., V]``, or with ``targets`` the summed cross entropy in float32.

        Args:
            input: Hidden states ``[..., D]``; with ``targets`` ``[N, D]``.
            targets: The tokens to predict ``[N]``.
        """
        if self.factor is not None:
            input = input * self.factor  # of the hidden states, which are smaller than the logits
        if targets is None:
            return cap_logits(super().forward(input), self.softcap)
        return summed_cross_entropy(input, self.weight, targets, bias_V=self.bias, softcap=self.softcap)
