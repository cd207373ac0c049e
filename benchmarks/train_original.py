"""The original's training step, reimplemented with current packages as a baseline for ``train.py``.

It pads rows to the longest, computes the whole tower, inserts the features image by image, computes logits at all
positions in float32, and averages over shifted logits. In stage 1 it trains the whole embedding and restores all rows
but two before each forward pass. Attention is SDPA, as fast as the flash-attention that the original patched in.

Source: LLaVAR, llava/model/llava.py, ``LlavaLlamaForCausalLM``; llava/train/train.py, ``train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.training_dataset import Collator, Item
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.tuning import TRAINED_ROWS, apply_tuning
from llavar_peft.recipe.schema import Projector, Tune


def prepare(model: LlavarForConditionalGeneration, tune: Tune) -> Any:
    """Freeze the parameters that the original froze, in place, and return the model to train; adapters are ours."""
    if not isinstance(tune, Projector):
        return apply_tuning(model, tune)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    return model


class OriginalTrainer(transformers.Trainer):
    """``transformers.Trainer`` with the original's loss, on records in the order of the data set."""

    def __init__(self, model: Any, arguments: Any, dataset: Any, callbacks: list[Any]) -> None:
        super().__init__(model=model, args=arguments, train_dataset=dataset, data_collator=padded, callbacks=callbacks)
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self._core = model.get_base_model() if hasattr(model, "get_base_model") else model
        embeddings = self._core.get_input_embeddings().weight
        self._rows = embeddings.detach().clone() if embeddings.requires_grad and _frozen(self._core) else None

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the cross entropy over logits at every position."""
        core = self._core
        embeddings = core.get_input_embeddings()
        if self._rows is not None:
            with torch.no_grad():
                embeddings.weight[:-TRAINED_ROWS] = self._rows[:-TRAINED_ROWS]
        embeds = _insert_features(core, embeddings(inputs["input_ids"]), inputs)
        hidden = core.model.language_model(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = core.lm_head(hidden).float()
        shifted = logits[:, :-1].contiguous().flatten(0, 1)
        targets = inputs["labels"][:, 1:].contiguous().flatten()
        return nn.functional.cross_entropy(shifted, targets, ignore_index=IGNORE_INDEX)


def padded(items: Sequence[Item]) -> dict[str, Any]:
    """Return a padded batch, without the keys for our trainer."""
    batch = Collator(0)(items)
    return {name: value for name, value in batch.items() if name not in ("ids", "faults")}


def _frozen(core: Any) -> bool:
    return not core.lm_head.weight.requires_grad


def _insert_features(core: Any, embeds_BTD: Tensor, inputs: dict[str, Any]) -> Tensor:
    config = core.config
    with torch.no_grad():
        tower = core.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        features_NPC = tower.hidden_states[config.vision_feature_layer][:, 1:]
    projected_NPD = core.model.multi_modal_projector(features_NPC)
    rows = []
    for ids, row_TD, image_PD in zip(inputs["input_ids"], embeds_BTD, projected_NPD, strict=True):
        first = int((ids == config.image_token_index).nonzero()[0])
        rows.append(torch.cat((row_TD[:first], image_PD, row_TD[first + len(image_PD) :])))
    return torch.stack(rows)
