"""Attributes of transformers' classes that have no public counterpart."""

from __future__ import annotations

from transformers import PretrainedConfig


def attention_implementation(config: PretrainedConfig) -> str:
    """Return the name of the attention implementation that a model with this configuration uses.

    Replaces: nothing public. ``PreTrainedModel.set_attn_implementation`` sets it and has no counterpart that reads it;
    transformers' guide to custom attention reads the same attribute. Since: transformers 4.36, last seen in 5.24.
    """
    return str(config._attn_implementation)
