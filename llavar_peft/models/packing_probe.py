"""Whether a decoder's attention can keep the conversations of a packed row apart, found by calling it without memory.

A packed row needs more than an attention function of its own: the decoder must pass the lengths of the conversations
to it through all of its modules, and must neither change the mask nor mix positions in other ways. Decoders that do not
are found among those that transformers marks as suitable, so that the marks alone are not believed.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModel, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as hf_logging

from llavar_peft.compat.dependency_internals import keeps_state

logger = logging.getLogger(__name__)

_PROBE = "packing_probe"
_LENGTHS = (2, 2)
_UNUSED_MASK = (1, 1, 1, 1)


def keeps_segments_apart(text_config: PretrainedConfig) -> bool:
    """Return whether packed rows are safe for a language model; if not, the log says so.

    Args:
        text_config: The language model's configuration.
    """
    calls: list[bool] = []

    def record(
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        segments: object = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        del key
        unchanged = attention_mask is None or tuple(attention_mask.shape) == _UNUSED_MASK
        calls.append(segments is not None and unchanged)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_PROBE, record)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    if not keeps_state(text_config):
        try:
            _call(copy.deepcopy(text_config))
        except Exception as error:  # noqa: BLE001 - such as experts, which are chosen by values; attention comes first
            logger.debug("the probe ended with %s: %s", type(error).__name__, error)
    if calls and all(calls):
        return True
    logger.info(
        "rows are padded: the layers of %r do not keep the conversations of a row apart", text_config.model_type
    )
    return False


@torch.no_grad()
def _call(text_config: PretrainedConfig) -> None:
    """Call a decoder without memory on a packed row."""
    with torch.device("meta"):
        # Any attention can be built but flash-attention, which needs its package and half precision.
        decoder: Any = AutoModel.from_config(
            text_config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # it warns about decoders that have an attention of their own
        decoder.set_attn_implementation(_PROBE)
        hf_logging.set_verbosity(verbosity)
        tokens = sum(_LENGTHS)
        decoder.eval()(
            inputs_embeds=torch.zeros(1, tokens, text_config.hidden_size),
            position_ids=torch.zeros(1, tokens, dtype=torch.int64),
            attention_mask=torch.zeros(_UNUSED_MASK, dtype=torch.bool),
            segments=_LENGTHS,
            use_cache=False,
        )
