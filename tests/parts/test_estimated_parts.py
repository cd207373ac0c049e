"""What is estimated from a model's files, without its weights, is what the model has that is built from them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from llavar_peft import Full, ModelConfig, build_model
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.preflight.estimate_counts import count_parameters
from llavar_peft.types import TemplateName
from tests.parts.tiny_parts import LANGUAGE_MODELS, TOWERS

Folder = Callable[[str], str]
TEMPLATES: tuple[TemplateName | None, ...] = (None, "chat", "vicuna_v1")
CASES = [
    (kind, tower, template, projector)
    for kind, tower, template, projector in zip(
        LANGUAGE_MODELS, cycle(TOWERS), cycle(TEMPLATES), cycle(("mlp2x_gelu", "linear")), strict=False
    )
]


def _check(source: ModelConfig) -> None:
    estimated = config_without_weights(source)
    model, processor = build_model(source)
    names = ("image_token_index", "image_seq_length", "use_im_start_end", "vision_feature_select_strategy",
             "vision_feature_layer", "projector_hidden_act", "tie_word_embeddings")  # fmt: skip
    assert {name: getattr(estimated, name) for name in names} == {name: getattr(model.config, name) for name in names}
    assert estimated.text_config.vocab_size == model.config.text_config.vocab_size
    assert estimated.image_seq_length == processor.num_image_tokens
    counts = count_parameters(estimated, Full())
    assert counts.whole == model.num_parameters()
    assert counts.tower == model.model.vision_tower.num_parameters()


@pytest.mark.parametrize(("kind", "tower_kind", "template", "projector"), CASES)
def test_parameters_and_positions(
    kind: str, tower_kind: str, template: TemplateName | None, projector: str, language_model: Folder, tower: Folder
) -> None:
    _check(
        ModelConfig(
            language_model=language_model(kind),
            vision_tower=tower(tower_kind),
            template=template,
            projector_type=projector,  # type: ignore[arg-type]
        )
    )


@pytest.mark.parametrize(("kind", "tower_kind"), [("qwen2", "siglip"), ("olmo2", "dinov2")])
def test_a_saved_checkpoint(kind: str, tower_kind: str, language_model: Folder, tower: Folder, tmp_path: Path) -> None:
    model, processor = build_model(
        ModelConfig(language_model=language_model(kind), vision_tower=tower(tower_kind), projector_type="mlp2x_gelu")
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _check(ModelConfig(checkpoint=str(tmp_path)))
