"""The optimizers of both parts: Muon for the layers' matrices, AdamW for the rest, warm-up and linear decay."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with singular values of about 1, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Keller Jordan, 2024) in fp32; torch's own Muon uses bf16, which is slow on a CPU."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = torch.lerp(parameter.grad, state["mean"], group["momentum"])
                size = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - 0.01 * group["lr"]).add_(_orthogonal(ahead), alpha=-group["lr"] * size)


def make_optimizers(
    layers: nn.Module, parameters: Iterable[nn.Parameter], rate: float, steps: int, slow: Iterable[nn.Parameter] = ()
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Make the two optimizers and their schedules.

    Args:
        layers: Modules whose matrices Muon trains.
        parameters: All trained parameters.
        rate: Peak learning rate.
        steps: Number of steps.
        slow: Those of `parameters` that are trained with a twentieth of the rate, because they start nearly right.

    Returns:
        The optimizers and, in the same order, the schedules.
    """
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    careful = list(slow)
    known = {id(parameter) for parameter in (*matrices, *careful)}
    others = [parameter for parameter in parameters if id(parameter) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=rate),
        torch.optim.AdamW(
            [{"params": others}, {"params": careful, "lr": rate / 20}], lr=rate, weight_decay=0.01, betas=(0.9, 0.98)
        ),
    ]

    def share(step: int) -> float:
        return max(0.0, min(1.0, (step + 1) / 40, (steps - step) / (0.6 * steps)))

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
