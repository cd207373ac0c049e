"""Cross-attention to the features of crops: nothing changes before training, and each token sees what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from llavar_peft.errors import ConfigError
from llavar_peft.models.cross_attention import CrossAttentionStack, Detail, DetailSegment, detail_segments
from llavar_peft.models.cross_attention_hooks import check_decoder
from llavar_peft.models.detail_features import ImageDetails
from llavar_peft.models.llavar_config import make_config
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing, packed_arguments
from llavar_peft.recipe.resolution import CrossAttention

WIDTH, PATCHES, IMAGE_ID = 16, 4, 20
IMAGE = [IMAGE_ID] * PATCHES


def _model(resolution: CrossAttention | None) -> LlavarForConditionalGeneration:
    size = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = make_config(
        LlamaConfig(**size, num_hidden_layers=2, vocab_size=20),
        CLIPVisionConfig(**size, num_hidden_layers=3, image_size=8, patch_size=4),
        vocab_size=23,
        image_token_id=IMAGE_ID,
        resolution=resolution,
    )
    return LlavarForConditionalGeneration(config).eval()


@pytest.fixture
def model() -> LlavarForConditionalGeneration:
    """Return a model whose cross-attention matters as much as its other parts."""
    made = _model(CrossAttention(grid=2))
    with torch.no_grad():
        for name, one in made.named_parameters():
            if one.ndim == 2:
                one.normal_(std=0.5 if "cross_attention" in name else 0.2)
    return made


def _images(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(count, 3, 8, 8, generator=generator),
        "detail_values": torch.randn(count, 4, 3, 8, 8, generator=generator),
    }


IDS = torch.tensor([[1, 3, *IMAGE, 5, 6, *IMAGE, 7, 8], [1, *IMAGE, 5, 6, 7, 8, 9, 10, 11, 12, 13]])


@torch.no_grad()
def test_the_untrained_model_answers_as_without_it() -> None:
    plain, model = _model(None), _model(CrossAttention(grid=2))
    shared = plain.state_dict()
    model.load_state_dict({**model.state_dict(), **shared})
    images = _images(3)
    expected = plain(input_ids=IDS, pixel_values=images["pixel_values"]).logits
    assert torch.equal(model(input_ids=IDS, **images).logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(input_ids=IDS, pixel_values=images["pixel_values"]).logits
        assert torch.equal(model(input_ids=IDS, **images).logits, expected)
    model.to(torch.bfloat16)
    expected = plain.to(torch.bfloat16)(input_ids=IDS, pixel_values=images["pixel_values"]).logits
    assert torch.equal(model(input_ids=IDS, **images).logits, expected)


def test_conversations_are_cut_where_images_start() -> None:
    # Two images, none, and one that is in the cache, behind which another one follows.
    assert detail_segments([(0, 9, [2, 6]), (9, 5, []), (20, 4, [-3, 1])]) == (
        DetailSegment(2, 6, 0, 1),
        DetailSegment(6, 9, 0, 2),
        DetailSegment(20, 21, 2, 3),
        DetailSegment(21, 24, 2, 4),
    )
    assert detail_segments([(5, 1, [-9, -4])]) == (DetailSegment(5, 6, 0, 2),)
    assert detail_segments([(0, 3, [0, 0])]) == (DetailSegment(0, 3, 0, 2),)
    assert detail_segments([(0, 3, [])]) == ()


def _reference(layer: Any, hidden_TD: Tensor, features: list[Tensor], visible: list[int]) -> Tensor:
    """Compute one token after the other, from the formula of the paper."""
    found = []
    for token_D, images in zip(hidden_TD, visible, strict=True):
        if not images:
            found.append(torch.zeros_like(token_D))
            continue
        all_FC = torch.cat(features[:images])
        query_Hd = layer.q_proj(layer.norm(token_D)).view(2, -1)
        keys_FHd, values_FHd = (one(all_FC).view(len(all_FC), 2, -1) for one in (layer.k_proj, layer.v_proj))
        scores_HF = torch.einsum("hd,fhd->hf", query_Hd, keys_FHd) / query_Hd.shape[1] ** 0.5
        found.append(layer.o_proj(torch.einsum("hf,fhd->hd", scores_HF.softmax(1), values_FHd).flatten()))
    return torch.stack(found)


@pytest.mark.parametrize("gradients", [True, False], ids=["direct", "absorbed"])
def test_each_token_sees_the_images_that_start_at_or_before_it(gradients: bool) -> None:
    torch.manual_seed(0)
    stack = CrossAttentionStack(1, WIDTH, 6, 2, num_crops=2)
    layer: Any = stack.layers[0]
    features = [torch.randn(8, 6), torch.randn(8, 6)]
    assert stack.crop_positions is not None
    placed = [one + stack.crop_positions.weight.repeat_interleave(4, dim=0) for one in features]
    hidden_BTD = torch.randn(1, 7, WIDTH)
    with torch.set_grad_enabled(gradients):
        features_FC, ends = stack.place(features, hidden_BTD)
        detail = Detail(stack, features_FC, ends, detail_segments([(0, 7, [2, 3])]))
        got = layer(hidden_BTD, features_FC, detail)[0]
        assert layer._absorbs(7) is not gradients  # otherwise both cases would compare the same way
        expected = _reference(layer, hidden_BTD[0], placed, [0, 0, 1, 2, 2, 2, 2])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def _gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("recomputed", [False, True])
def test_packed_and_recomputed_rows_give_the_gradients_of_padded_ones(
    model: LlavarForConditionalGeneration, recomputed: bool
) -> None:
    images, lengths = _images(3), (14, 0, 13)
    targets = IDS.clone()
    targets[1, 13:] = -100
    targets[:, 0] = -100
    loss, expected = _gradients(model, input_ids=IDS, targets=targets, **images)
    assert expected["model.cross_attention.crop_positions.weight"].any()
    if recomputed:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    enable_packing(model)
    lengths, starts = (14, 13), ([2, 8], [1])
    details = ImageDetails(detail_segments(zip((0, 14), lengths, starts, strict=True)))
    packed = torch.cat([IDS[0], IDS[1, :13]])[None], torch.cat([targets[0], targets[1, :13]])[None]
    arguments = packed_arguments(lengths, model, torch.device("cpu"))
    found, gradients = _gradients(
        model, input_ids=packed[0], targets=packed[1], details=details, use_cache=False, **arguments, **images
    )
    torch.testing.assert_close(found, loss)
    assert set(gradients) == set(expected)
    for name, one in expected.items():
        torch.testing.assert_close(gradients[name], one, atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_without_an_image_gives_every_parameter_a_gradient(model: LlavarForConditionalGeneration) -> None:
    model.train()
    _, with_image = _gradients(model, input_ids=IDS, targets=IDS, **_images(3))
    _, without = _gradients(model, input_ids=torch.tensor([[1, 3, 5]]), targets=torch.tensor([[1, 3, 5]]))
    assert set(without) == set(with_image)
    assert not any(one.any() for name, one in without.items() if "cross_attention" in name)


@torch.no_grad()
def test_rows_of_other_lengths_do_not_matter(model: LlavarForConditionalGeneration) -> None:
    images = _images(3)
    together = model(input_ids=IDS, **images).logits
    first = model(input_ids=IDS[:1], **{name: one[:2] for name, one in images.items()}).logits
    torch.testing.assert_close(together[:1], first, atol=1e-5, rtol=1e-5)
    # A later image changes nothing before it.
    images["detail_values"][1] += 1
    changed = (model(input_ids=IDS, **images).logits - together).abs().amax(dim=-1)
    assert changed[0, :8].eq(0).all()
    assert changed[0, 8:].gt(0).all()
    assert changed[1].eq(0).all()


def test_inputs_that_do_not_fit_the_model_are_rejected(model: LlavarForConditionalGeneration) -> None:
    images = _images(3)
    with pytest.raises(ValueError, match="got no detail_values, expected them"):
        model(input_ids=IDS, pixel_values=images["pixel_values"])
    with pytest.raises(ValueError, match="expected none for a model without cross-attention"):
        _model(None)(input_ids=IDS, **images)
    with pytest.raises(ValueError, match="got no input_ids, expected them, or details"):
        model(inputs_embeds=torch.zeros(1, 2, WIDTH), detail_values=images["detail_values"])
    wrong = torch.cat([IDS[:1], IDS[:1, 2:3]], dim=1)
    inputs = {name: one[:2] for name, one in images.items()}
    inputs["image_places"] = (wrong[0] == IMAGE_ID).nonzero()[:8, 0]
    with pytest.raises(ValueError, match="got 9 image tokens in a row, expected a multiple of 4"):
        model(input_ids=wrong, **inputs)


_SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "cohere2", "mixtral"])
def test_language_models_that_add_the_attention_s_output_are_accepted(kind: str) -> None:
    check_decoder(AutoConfig.for_model(kind, **_SIZE, num_key_value_heads=2, vocab_size=40, pad_token_id=0))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "gpt2"])
def test_language_models_that_change_the_attention_s_output_are_rejected(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"got {kind}, expected layers that add .* use resolution: {{type: tiles}}"):
        check_decoder(AutoConfig.for_model(kind, **_SIZE, num_key_value_heads=2, vocab_size=40, pad_token_id=0))
    scaled = AutoConfig.for_model("granite", **_SIZE, residual_multiplier=0.5, vocab_size=40, pad_token_id=0)
    with pytest.raises(ConfigError, match="got granite"):
        check_decoder(scaled)
