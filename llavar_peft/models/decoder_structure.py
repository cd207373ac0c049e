"""Check that a language model of transformers can be the decoder of a LLaVAR, before its weights are read.

There is no list of supported models. The modules are built without memory and examined: the embeddings must be an input
that can be replaced, the layers a list, and the head linear. A model that would not compute what it was trained to
compute is rejected.
"""

from __future__ import annotations

import copy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from llavar_peft.errors import ConfigError
from llavar_peft.models.chunked_loss import SCALED_LOGITS, cap_logits, logits_factor
from llavar_peft.models.pretrained_files import unreadable_settings
from llavar_peft.weights.io import tensor_names

_MATRIX = 2
_PROBED_ROWS = 8
_OTHER = "give the folder of a language model such as Vicuna, Llama, Qwen or Mistral"


class _Hidden(BaseModelOutputWithPast):
    """A decoder's output with hidden states only: every other field that a head reads is None."""

    def __getattr__(self, name: str) -> None:
        return None


def outline(config: PretrainedConfig, folder: Path) -> Any:
    """Return a language model with its head, without memory.

    Args:
        config: Its configuration.
        folder: Its folder, for messages.

    Raises:
        ConfigError: No model can be made from the configuration.
    """
    changed = copy.deepcopy(config)
    try:
        changed.pad_token_id = 0  # it may have no row yet, which is checked with those of all other tokens
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                changed, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    except Exception as error:  # transformers passes on whatever the settings cause
        raise unreadable_settings(folder, "language model", error) from error


def find_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a decoder's layers.

    Raises:
        ConfigError: It has no layers where this package looks for them.
    """
    candidates = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and tensor_names.is_layers(name)
    }
    if not candidates:
        raise ConfigError.at(
            "model.language_model", f"a decoder without a list of layers (got {type(decoder).__name__})", _OTHER
        )
    largest = max(candidates, key=lambda name: sum(weight.numel() for weight in candidates[name].parameters()))
    return largest, candidates[largest]


def check_structure(model: Any, folder: Path) -> None:
    """Reject a language model that cannot be used with its embeddings as input and a linear head.

    Args:
        model: From ``outline``.
        folder: Its folder, for messages.

    Raises:
        ConfigError: Names what it lacks.
    """
    config = model.config
    where = f"{folder / 'config.json'}:"
    if fault := _input_fault(model):
        raise ConfigError.at(f"{where}model_type", f"{fault} (got {config.model_type!r})", _OTHER)
    find_layers(_base(model))
    if fault := _head_fault(config, folder):
        scaled = [name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
        name = scaled[0] if scaled else "model_type"
        what = f"how {config.model_type!r} scales its logits is not known" if scaled else fault
        raise ConfigError.at(f"{where}{name}", f"{what} (got {getattr(config, name)!r})", _OTHER)


def _base(model: Any) -> nn.Module:
    """Return the model without its head."""
    base: nn.Module = getattr(model, model.base_model_prefix)
    return base


def _input_fault(model: Any) -> str | None:
    """Return why a decoder cannot take embeddings of text and images as its input; None if it can."""
    config, embeddings = model.config, model.get_input_embeddings()
    base = getattr(model, model.base_model_prefix, None)
    if base is None or type(base) is not MODEL_MAPPING.get(type(config), None):
        return "transformers has no decoder without a head for this language model"
    arguments = signature(type(base).forward).parameters
    if "inputs_embeds" not in arguments:
        return "a decoder that takes token ids only, and no image features"
    if not {"cache", "past_key_values"} & set(arguments):  # as RWKV's, whose outputs LLaVA does not understand
        return "a decoder whose memory of a text is no cache of transformers"
    names = [name for name, module in base.named_modules() if module is embeddings]
    if not names or not tensor_names.is_embeddings(names[0]):
        return "a decoder whose embeddings are not found"
    rows, width = embeddings.weight.shape
    if rows != config.vocab_size:
        return f"embeddings of {rows} rows for a vocabulary of {config.vocab_size} are not supported"
    if width != config.hidden_size:
        return f"embeddings of {width} numbers for hidden states of {config.hidden_size} are not supported"
    other_tables = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and module is not embeddings and module.num_embeddings >= rows
        and "position" not in name and "wpe" not in name
    ]  # fmt: skip
    if other_tables:
        return f"a decoder that looks up token ids in more than its embeddings ({other_tables[0]})"
    return None


def _head_fault(config: PretrainedConfig, folder: Path) -> str | None:
    """Return why a linear head with a factor and a cap does not compute a language model's logits; None if it does.

    The logits are compared with those of the model's own head, for random hidden states and a small vocabulary.
    """
    small = copy.deepcopy(config)
    small.vocab_size = _PROBED_ROWS
    if hasattr(small, "output_router_logits"):
        small.output_router_logits = False
    model = outline(small, folder)
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if not isinstance(head, nn.Linear):
        return "its head is no linear layer"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_1TD = draw(1, 3, config.hidden_size)
    weight_VD = draw(*head.weight.shape) * config.hidden_size**-0.5
    head.weight = nn.Parameter(weight_VD)
    if head.bias is not None:
        head.bias = nn.Parameter(draw(len(head.bias)))
    decoder.forward = lambda *_, **__: _Hidden(last_hidden_state=hidden_1TD)
    try:
        with torch.no_grad():
            got = model.eval()(inputs_embeds=torch.zeros_like(hidden_1TD), use_cache=False).logits
    except Exception:  # noqa: BLE001 - a part besides the head has no memory, or the decoder is no part of the model
        return "its logits are not computed by a head alone"
    plain = nn.functional.linear(hidden_1TD * (logits_factor(config) or 1.0), weight_VD, head.bias)
    expected = cap_logits(plain, getattr(config, "final_logit_softcapping", None))
    return None if torch.allclose(got, expected, atol=1e-4) else "its logits are not those of a linear head"


def check_length(decoder: Any, max_length: int) -> None:
    """Reject records that are longer than a table of learned positions, in which the model looks them up.

    Args:
        decoder: The language model without its head.
        max_length: The largest number of tokens of a record.

    Raises:
        ConfigError: The table has fewer rows.
    """
    limit = getattr(decoder.config, "max_position_embeddings", None)
    token_tables = set(decoder.get_input_embeddings().modules())  # with trained rows, a module within another
    tables = (module for module in decoder.modules() if isinstance(module, nn.Embedding))
    learns_positions = any(table not in token_tables for table in tables)
    if learns_positions and limit is not None and max_length > limit:
        raise ConfigError.at(
            "max_length",
            f"more tokens than {decoder.config.model_type!r} has learned positions for (got {max_length}, expected at "
            f"most {limit})",
            f"set max_length to {limit}, or use a language model with rotary positions",
        )


def check_linear(config: PretrainedConfig, quantize: str) -> None:
    """Reject a quantization that would leave matrices of the language model's layers as they are.

    bitsandbytes quantizes linear layers. The experts of a mixture are other modules, and most of its weights.

    Args:
        config: The language model's.
        quantize: The format, for the message.

    Raises:
        ConfigError: Names a matrix that is no linear layer's.
    """
    model = outline(config, Path(config.name_or_path or "config.json"))
    _, layers = find_layers(_base(model))
    linear = {id(module.weight) for module in layers.modules() if type(module) is nn.Linear}
    not_quantized = {
        name.partition(".")[2]: parameter  # without the layer's number
        for name, parameter in layers.named_parameters()
        if parameter.ndim >= _MATRIX and id(parameter) not in linear
    }
    if not_quantized:
        largest = max(not_quantized, key=lambda name: not_quantized[name].numel())
        raise ConfigError.at(
            "model.quantize",
            f"{quantize} quantizes linear layers only, and would leave other matrices of {config.model_type!r} as they "
            f"are (such as {largest})",
            "remove quantize, or use another language model",
        )
