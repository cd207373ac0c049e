"""How an answer is sampled: the settings, and the choice of the next token of each row of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import torch
from torch import Tensor

from llavar_peft.constants import TOP_K
from llavar_peft.errors import ConfigError, LlavarError, WeightsError

_SMALLEST = 1e-30
"""Smaller temperatures and shares would be 0 in float32; at this value already, only the most likely token is left."""


_TYPES = (
    ("max_new_tokens", Integral, "a whole number"),
    ("temperature", Real, "a number"),
    ("top_p", Real, "a number"),
    ("top_k", Integral, "a whole number"),
    ("seed", (Integral, type(None)), "a whole number"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is sampled. Defaults: LLaVAR, llava/eval/run_llava.py, with transformers 4.28.

    Attributes:
        max_new_tokens: Maximum number of tokens, the closing ``</s>`` included.
        temperature: 0 is greedy.
        top_p: Share of the probability mass to sample from (nucleus sampling).
        top_k: Number of most likely tokens to sample from; 0 for all.
        seed: Makes the answer repeatable, independent of the other rows of the batch.
        stop: Texts that end the answer and are not part of it.
        logprobs: Whether to record the log-probabilities (at temperature 1) of the chosen tokens.

    Raises:
        ConfigError: A value is out of its range.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.2
    top_p: float = 1.0
    top_k: int = TOP_K
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name, kinds, expected in _TYPES:
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ConfigError.at(name, f"got {value!r}, expected {expected}", "change it")
        faults = (
            (self.max_new_tokens < 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (not 0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more"),
            (not 0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1"),
            (self.top_k < 0, "top_k", self.top_k, "0 or more"),
            (self.seed is not None and not 0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1"),
            ("" in self.stop, "stop", self.stop, "a tuple of texts that are not empty"),
        )
        for invalid, name, got, expected in faults:
            if invalid:
                raise ConfigError.at(name, f"got {got!r}, expected {expected}", "change it")


class SamplingSettings(TypedDict, total=False):
    """The fields of ``Sampling``, for functions that take them as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool


def new_generator(sampling: Sampling) -> torch.Generator:
    """Return a generator for one row. It is on the CPU, so that its numbers do not depend on batch or device."""
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
        samplings: The settings of each row.
        generators: The generator of each row; those of greedy rows are not used.

    Returns:
        B ids, and their log-probabilities at temperature 1 if any row asks for them.

    Raises:
        WeightsError: A row that is sampled has no numbers as logits.
    """
    logits_BV = logits_BV.float()
    chosen_B = logits_BV.argmax(dim=-1)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if sampled:
        chosen_B[sampled] = _sample(
            logits_BV[sampled], [samplings[row] for row in sampled], [generators[row] for row in sampled]
        )
    logprobs = None
    if any(sampling.logprobs for sampling in samplings):
        logprobs = logits_BV.log_softmax(dim=-1).gather(1, chosen_B[:, None])[:, 0].tolist()
    tokens: list[int] = chosen_B.tolist()
    if min(tokens, default=0) < 0:
        raise invalid_logits()
    return tokens, logprobs


def invalid_logits() -> LlavarError:
    """Return the error for logits that are no numbers."""
    fix = "download its config.json and weights again, or use bfloat16"
    return WeightsError.at("model", "computes logits that are no numbers", fix)


def _sample(logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """Sample from the top k tokens, restricted to their nucleus, with one uniform number for each row.

    Source: transformers 4.28, ``TopKLogitsWarper`` (tokens tied with the k-th stay as well) and ``TopPLogitsWarper``.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_BV.device)[:, None]

    # Shifted so that the largest logit is 0: a tiny temperature then cannot overflow.
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / column(
        [max(s.temperature, _SMALLEST) for s in samplings]
    )
    probabilities_BV, ids_BV = scaled_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    # 0 means all tokens: the last one has the smallest probability.
    last_B1 = torch.tensor([(s.top_k or probabilities_BV.shape[1]) - 1 for s in samplings], device=logits_BV.device)
    least_B1 = probabilities_BV.gather(1, last_B1[:, None].clamp(max=probabilities_BV.shape[1] - 1))
    probabilities_BV = probabilities_BV * (probabilities_BV >= least_B1)
    probabilities_BV = probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
    upto_BV = probabilities_BV.cumsum(dim=-1)
    within_BV = upto_BV - probabilities_BV < column([max(s.top_p, _SMALLEST) for s in samplings])
    kept_BV = within_BV & (probabilities_BV > 0)  # the first token is always kept
    mass_B1 = (probabilities_BV * kept_BV).sum(dim=-1, keepdim=True)
    uniform_B1 = column([float(torch.rand((), generator=generator)) for generator in generators])
    place_B1 = (upto_BV <= uniform_B1 * mass_B1).sum(dim=-1, keepdim=True)
    place_B1 = place_B1.minimum(kept_BV.sum(dim=-1, keepdim=True) - 1)
    # Without a number among its logits, a row keeps no token: found where the ids are fetched anyway.
    return ids_BV.gather(1, place_B1.clamp(min=0)).where(place_B1 >= 0, -1)[:, 0]
