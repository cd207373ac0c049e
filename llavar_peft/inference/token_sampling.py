"""The next token of each row of a batch, each row in its own way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llavar_peft.inference.generation_request import Sampling


def new_generator(sampling: Sampling) -> torch.Generator:
    """A generator of a row's own: what else is in the batch, and on which device, does not change its numbers."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose_tokens(
    logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> tuple[list[int], list[float] | None]:
    """Choose one token for each row.

    Args:
        logits_BV: ``[B, V]``, of any float type.
        samplings: B ways.
        generators: B generators; only those of rows that are not greedy are drawn from.

    Returns:
        B ids, and their log-probabilities at temperature 1 if any row wants them.
    """
    logits_BV = logits_BV.float()
    chosen_B = logits_BV.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        chosen_B[drawn] = _draw(logits_BV[drawn], [samplings[row] for row in drawn], [generators[row] for row in drawn])
    logprobs = None
    if any(sampling.logprobs for sampling in samplings):
        logprobs = logits_BV.log_softmax(dim=-1).gather(1, chosen_B[:, None])[:, 0].tolist()
    return chosen_B.tolist(), logprobs


def _draw(logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """Sampling from the likeliest tokens, then from their nucleus, by one uniform number for each row.

    Source: transformers 4.28, ``TopKLogitsWarper`` (what is as likely as the last stays too) and ``TopPLogitsWarper``.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_BV.device)[:, None]

    # The largest logit is 0, so that a tiny temperature does not overflow.
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / column([s.temperature for s in samplings])
    probabilities_BV, ids_BV = scaled_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    # 0 stands for all: the last of them has the least probability.
    last_B1 = torch.tensor([(s.top_k or probabilities_BV.shape[1]) - 1 for s in samplings], device=logits_BV.device)
    least_B1 = probabilities_BV.gather(1, last_B1[:, None].clamp(max=probabilities_BV.shape[1] - 1))
    probabilities_BV = probabilities_BV * (probabilities_BV >= least_B1)
    probabilities_BV = probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
    upto_BV = probabilities_BV.cumsum(dim=-1)
    within_BV = upto_BV - probabilities_BV < column([s.top_p for s in samplings])
    kept_BV = within_BV & (probabilities_BV > 0)  # always the first
    mass_B1 = (probabilities_BV * kept_BV).sum(dim=-1, keepdim=True)
    uniform_B1 = column([float(torch.rand((), generator=generator)) for generator in generators])
    place_B1 = (upto_BV <= uniform_B1 * mass_B1).sum(dim=-1, keepdim=True)
    place_B1 = place_B1.minimum(kept_BV.sum(dim=-1, keepdim=True) - 1)
    return ids_BV.gather(1, place_B1)[:, 0]
