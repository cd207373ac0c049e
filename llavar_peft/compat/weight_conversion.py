"""transformers' conversion of a checkpoint's tensors into those of its modules, without building the model in memory.

Checkpoints on the hub hold the experts of a mixture one by one, and modules hold all of a layer as one tensor; other
kinds were renamed. ``from_pretrained`` converts such tensors while it fills a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def convert_stored(model: Any, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the names of a model's modules.

    Replaces the loop of ``convert_and_load_state_dict_in_model``, which fills a model. peft uses the same functions.
    Since: transformers 5.0, last seen in 5.24.

    Args:
        model: A model of transformers, which may be on the device ``meta``.
        stored: By the names in the files. Tensors that are only renamed are not read.

    Returns:
        Tensors that the model does not have keep a name that it does not have, except those that its class ignores.

    Raises:
        Exception: Whatever the conversion raises for tensors that it does not fit.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix, expected = model.base_model_prefix, model.state_dict()
    found: dict[str, Tensor] = {}
    collected: dict[str, Any] = {}
    for name in sorted(stored, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if new not in expected:
            plain, _ = rename_source_key(name, [], [], prefix, expected)
            new, pattern = (plain, None) if plain in expected else (new, pattern)
        if pattern is None or new not in expected:
            if new in expected or not _is_ignored(model, name):
                found[new] = stored[name]
            continue
        converter = collected.setdefault(new, deepcopy(by_pattern[pattern]))
        converter.add_tensor(new, name, pattern, stored[name])
    for new, converter in collected.items():
        for name, made in converter.convert(new, model=model, config=model.config).items():
            found[name] = made[0] if isinstance(made, list) else made
    return found


def _tied_keys(model: Any) -> dict[str, str]:
    decoder = model.model.language_model
    embeddings = decoder.get_input_embeddings()
    name = next(name for name, module in decoder.named_modules() if module is embeddings)
    return {"lm_head.weight": f"model.language_model.{name}.weight"}


tied_head = property(_tied_keys)
"""The attribute ``_tied_weights_keys`` of a LLaVA whose head can be tied to embeddings of any name.

Replaces: nothing public. LLaVA's own names LLaMA's embeddings. Since: transformers 5.0, last seen in 5.24.
"""


def _is_ignored(model: Any, name: str) -> bool:
    """Return whether a model's class ignores a tensor of a checkpoint, such as the layer that predicts a second token.

    Replaces: nothing public. Since: transformers 4.0, last seen in 5.24.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
