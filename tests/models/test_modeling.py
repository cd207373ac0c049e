"""The forward pass: the tower stops where its output is projected, and the splice is checked."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from llavar_peft.errors import ConfigError
from llavar_peft.models.llavar_config import make_config
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.vision_tower import LinearProjector

LAYERS, PATCHES, IMAGE_ID = 4, 4, 20


@pytest.fixture(scope="module")
def model() -> LlavarForConditionalGeneration:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = make_config(
        LlamaConfig(**size, num_hidden_layers=2, vocab_size=20),
        CLIPVisionConfig(**size, num_hidden_layers=LAYERS, image_size=8, patch_size=4),
        vocab_size=23,
        image_token_id=IMAGE_ID,
    )
    return LlavarForConditionalGeneration(config).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _stock_hidden_states(model: LlavarForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, ...]:
    """Return the hidden states of CLIP's own model with the same weights."""
    stock = CLIPVisionModel(model.config.vision_config).eval()
    stock.load_state_dict(model.model.vision_tower.state_dict())
    states: tuple[Tensor, ...] = stock(pixels, output_hidden_states=True).hidden_states
    return states


@pytest.mark.parametrize("layer", [None, *range(-LAYERS - 1, LAYERS + 1)])
@torch.no_grad()
def test_features_are_those_of_the_complete_tower(
    model: LlavarForConditionalGeneration, pixels: Tensor, layer: int | None
) -> None:
    expected = model.model.multi_modal_projector(_stock_hidden_states(model, pixels)[-2 if layer is None else layer])
    output = model.get_image_features(pixels, vision_feature_layer=layer)
    assert torch.equal(torch.stack(output.pooler_output), expected[:, 1:])
    full = model.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy="full")
    assert torch.equal(torch.stack(full.pooler_output), expected)


@torch.no_grad()
def test_options_of_the_library_s_method_are_supported(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    output = model.get_image_features(pixels, output_hidden_states=True, output_attentions=False)
    assert len(output.hidden_states) == LAYERS + 1
    for got, expected in zip(output.pooler_output, model.get_image_features(pixels).pooler_output, strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_a_layer_given_to_forward_is_used(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    ids = torch.tensor([[1, *[IMAGE_ID] * PATCHES, 5]])
    default, deeper = (model(input_ids=ids, pixel_values=pixels[:1], vision_feature_layer=n).logits for n in (-2, -1))
    assert torch.equal(default, model(input_ids=ids, pixel_values=pixels[:1]).logits)
    assert not torch.equal(default, deeper)


def test_layers_that_are_not_needed_are_not_computed(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    computed: list[int] = []
    layers = model.model.vision_tower.encoder.layers
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: computed.append(number))
        for number, layer in enumerate(layers)
    ]
    model.get_image_features(pixels)
    for hook in hooks:
        hook.remove()
    assert computed == list(range(LAYERS - 1))


@torch.no_grad()
def test_the_tower_alone_is_clip(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    expected = _stock_hidden_states(model, pixels)
    assert len(output.hidden_states) == LAYERS + 1
    for got, one in zip(output.hidden_states, expected, strict=True):
        assert torch.equal(got, one)
    assert torch.equal(output.last_hidden_state, expected[-1])


@pytest.mark.parametrize("layer", [LAYERS + 1, -LAYERS - 2])
def test_a_hidden_state_that_does_not_exist_is_rejected(
    model: LlavarForConditionalGeneration, pixels: Tensor, layer: int
) -> None:
    with pytest.raises(ConfigError, match=f"got {layer}, expected an integer from -5 to 4"):
        model.get_image_features(pixels, vision_feature_layer=layer)


def test_all_layers_are_saved_and_loaded(model: LlavarForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = LlavarForConditionalGeneration.from_pretrained(tmp_path)
    state = again.state_dict()
    assert f"model.vision_tower.encoder.layers.{LAYERS - 1}.mlp.fc2.weight" in state
    for (name, tensor), (other, loaded) in zip(model.state_dict().items(), state.items(), strict=True):
        assert name == other
        assert torch.equal(tensor, loaded), name


def test_image_tokens_and_features_must_match(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=torch.tensor([[1, IMAGE_ID, 5]]), pixel_values=pixels[:1])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=pixels)


@torch.no_grad()
def test_embeddings_can_be_given_instead_of_ids(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    ids = torch.tensor([[1, *[IMAGE_ID] * PATCHES, 5]])
    embeds = model.get_input_embeddings()(ids)
    expected = model(input_ids=ids, pixel_values=pixels[:1]).logits
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=pixels[:1]).logits, expected)


def test_a_training_batch_without_an_image_reaches_the_projector(model: LlavarForConditionalGeneration) -> None:
    model.train()
    model.zero_grad()
    ids = torch.tensor([[1, 3, 5]])
    model(input_ids=ids, targets=ids).loss.backward()
    model.eval()
    gradient = model.model.multi_modal_projector.weight.grad
    assert gradient is not None
    assert not gradient.any()


@torch.no_grad()
def test_the_tower_runs_once_for_each_size_of_image(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    wide = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(2))
    images = [pixels[0], wide, pixels[1]]
    sizes: list[tuple[int, ...]] = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
    together = model.get_image_features(images).pooler_output
    hook.remove()
    assert sizes == [(2, 3, 8, 8), (1, 3, 8, 12)]
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(features, model.get_image_features(image[None]).pooler_output[0])


def test_given_places_change_neither_loss_nor_gradients(model: LlavarForConditionalGeneration, pixels: Tensor) -> None:
    ids = torch.tensor([[1, *[IMAGE_ID] * PATCHES, 5, 6], [1, 4, *[IMAGE_ID] * PATCHES, 5]])
    targets = torch.full_like(ids, -100)
    targets[:, -2:] = 7
    places = {
        "image_places": (ids.flatten() == IMAGE_ID).nonzero()[:, 0],
        "supervised_places": (targets.flatten() == 7).nonzero()[:, 0],
    }
    found = []
    for given in ({}, places):
        model.zero_grad()
        loss = model(input_ids=ids, pixel_values=pixels, targets=targets, **given).loss
        loss.backward()
        found.append([loss.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)])
    assert len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="got 7 image tokens and 8 image features"):
        model(input_ids=ids, pixel_values=pixels, image_places=places["image_places"][1:])


def test_the_projector_computes_in_its_own_dtype_except_under_autocast() -> None:
    projector = LinearProjector(4, 4)
    features = torch.ones(2, 4, dtype=torch.bfloat16)
    assert projector(features).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projector(features).dtype == torch.bfloat16
    assert projector.to(torch.bfloat16)(features.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_frozen_tower_is_not_computed_again_for_gradients(
    model: LlavarForConditionalGeneration, pixels: Tensor, trained: bool
) -> None:
    """With gradient checkpointing, transformers marks the embeddings of the tower too."""
    model = copy.deepcopy(model).train()
    model.model.vision_tower.requires_grad_(trained)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs: list[Tensor] = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.layer_norm2.register_forward_hook(lambda _, __, output: outputs.append(output))
    ids = torch.tensor([[1, *[IMAGE_ID] * PATCHES, 5]])
    model(input_ids=ids, pixel_values=pixels[:1], targets=ids).loss.backward()
    assert len(outputs) == (LAYERS - 1) * (2 if trained else 1)
    assert [output.requires_grad for output in outputs] == [trained] * len(outputs)
    gradient = model.model.multi_modal_projector.weight.grad
    assert gradient is not None
    assert gradient.any()
    assert (model.model.vision_tower.embeddings.patch_embedding.weight.grad is not None) == trained
