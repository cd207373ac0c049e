"""The logits of a short text with an image, through a model whose weights are read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from llavar_peft.errors import ConfigError, MissingDependencyError, WeightsError
from llavar_peft.models.chunked_loss import cap_logits, logits_factor
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.models.llavar_config import read_flat_text_config
from llavar_peft.models.pretrained_files import make_part_settings
from llavar_peft.models.probe_weights import Weights
from llavar_peft.weights.io import tensor_names

PATCHES = 8
"""Number of random feature vectors that represent the image."""
_TEXT = ("USER: What is on the sign?", " ASSISTANT: OPEN 9:00 - 17:30")
_DRAWN = 21
"""Number of random ids instead of the text's, without a tokenizer."""
_EPSILON = 1e-12
_MATRIX = 2  # dimensions


@dataclass(frozen=True, slots=True)
class LogitsGap:
    """The difference between two models' logits on the probe.

    Attributes:
        tokens: Number of positions compared.
        relative: Root mean square of the difference, divided by the standard deviation of the first model's logits.
        largest: Largest absolute difference.
        same_top: Share of the positions at which both models have the same most likely token.
    """

    tokens: int
    relative: float
    largest: float
    same_top: float


class _StreamedLinear(nn.Module):
    """A linear layer whose weight is read from disk each time it is used.

    Args:
        weights: The model.
        name: The layer's name, without ``.weight``.
    """

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self._weights = weights
        self._name = name

    @property
    def weight(self) -> Tensor:
        """The whole weight, for modules that use it without calling the layer, as routers to experts do."""
        return self._weights.tensor(f"{self._name}.weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias, if there is one."""
        name = f"{self._name}.bias"
        return self._weights.tensor(name) if self._weights.has(name) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        output, bias = self._weights.linear(f"{self._name}.weight", x), self.bias
        return output if bias is None else output + bias


@torch.no_grad()
def probe_logits(weights: Weights, config: PretrainedConfig, ids: Tensor, image_id: int) -> Tensor:
    """Run the projector and the language model.

    Args:
        weights: The model.
        config: The language model's configuration.
        ids: Shape (tokens,); at each ``image_id``, random features are passed through the projector.
        image_id: The id of the image token.

    Returns:
        Logits in float32, shape (tokens, vocabulary).
    """
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModel.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    embedding = model.get_input_embeddings()
    # The module of the embeddings may scale them; it gets the rows that are used, in their order.
    embedding.padding_idx = None
    own = next(name for name, module in model.named_modules() if module is embedding)
    embeddings = f"model.language_model.{own}.weight"
    embedding.weight = nn.Parameter(weights.rows(embeddings, ids), requires_grad=False)
    x = embedding(torch.arange(len(ids))).clone()
    patch = ids == image_id
    x[patch] = _image_features(weights, int(patch.sum()))
    _stream_layers(model, weights)
    hidden = model.eval()(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
    head = embeddings if config.tie_word_embeddings else tensor_names.HEAD
    hidden = hidden * (logits_factor(config) or 1.0)
    logits = weights.linear(head, hidden)
    if weights.has(tensor_names.HEAD_BIAS):
        logits = logits + weights.tensor(tensor_names.HEAD_BIAS)
    return cap_logits(logits, getattr(config, "final_logit_softcapping", None))


def _stream_layers(model: nn.Module, weights: Weights) -> None:
    """Replace the linear layers of a language model without memory, and read its other tensors, which are small."""
    for path, module in list(model.named_modules()):
        name = f"model.language_model.{path}"
        if isinstance(module, nn.Linear):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, _StreamedLinear(weights, name))
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim > _MATRIX and not isinstance(module, nn.Conv1d):
                _read_when_called(module, own, weights, f"{name}.{own}")
            elif parameter.is_meta:
                setattr(module, own, nn.Parameter(weights.tensor(f"{name}.{own}"), requires_grad=False))


def _read_when_called(module: nn.Module, own: str, weights: Weights, name: str) -> None:
    """Read a large tensor that is no linear layer's, such as a layer's experts, only while its module is called."""
    absent = module.get_parameter(own)

    def read(*_: Any) -> None:
        setattr(module, own, nn.Parameter(weights.tensor(name), requires_grad=False))

    def release(*_: Any) -> None:
        setattr(module, own, absent)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(release)


def _image_features(weights: Weights, count: int) -> Tensor:
    """Return random features, passed through the projector, shape (count, width)."""
    two_layers = weights.has(tensor_names.PROJECTOR + "linear_1.weight")
    first, *second = tensor_names.projector_names("gelu" if two_layers else "linear")[::2]
    width = weights.shape(first)[1]
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    for name in (first, *second):
        if name != first:
            features = nn.functional.gelu(features)
        features = weights.linear(name, features) + weights.tensor(name.removesuffix("weight") + "bias")
    return features


def logits_gap(expected: Tensor, got: Tensor) -> LogitsGap:
    """Compare two models' logits of shape (tokens, vocabulary)."""
    difference = got - expected
    deviation = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return LogitsGap(
        tokens=len(expected),
        relative=float(difference.square().mean().sqrt() / (deviation + _EPSILON)),
        largest=float(difference.abs().max()),
        same_top=float((expected.argmax(-1) == got.argmax(-1)).float().mean()),
    )


def read_config(config: Mapping[str, Any]) -> tuple[PretrainedConfig, int]:
    """Return the language model's configuration and the id of the image token."""
    if "text_config" in config:
        text = make_part_settings(config["text_config"], Path("config.json"), default="llama")
        return text, int(config["image_token_index"])
    text = read_flat_text_config(config, Path("config.json"))
    return text, text.vocab_size - (3 if config.get("mm_use_im_start_end") else 1)


def probe_ids(tokenizers: tuple[Path, ...], vocab_size: int, image_id: int) -> Tensor:
    """Return the ids of a text around an image, or random ids if no tokenizer can be loaded."""
    for folder in tokenizers:
        try:
            tokenizer = load_tokenizer(folder)
        except (ConfigError, WeightsError, MissingDependencyError):
            continue
        before, after = (tokenizer.encode(text, add_special_tokens=False) for text in _TEXT)
        break
    else:
        drawn = torch.randint(3, image_id, (_DRAWN,), generator=torch.Generator().manual_seed(0)).tolist()
        before, after = drawn[: _DRAWN // 2], drawn[_DRAWN // 2 :]
    image = [image_id] * PATCHES
    if vocab_size > image_id + 2:  # <im_start> and <im_end> follow <im_patch>
        image = [image_id + 1, *image, image_id + 2]
    return torch.tensor([1, *before, *image, *after])
