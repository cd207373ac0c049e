"""Language models of many kinds: the logits of transformers, packed rows, soft caps, new rows, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config

from llavar_peft import Lora, ModelConfig, build_model
from llavar_peft.errors import ConfigError
from llavar_peft.models.chunked_loss import summed_cross_entropy
from llavar_peft.models.linear_layers import find_linear_layers
from llavar_peft.models.packed_attention import enable_packing, packed_arguments
from llavar_peft.models.tuning import apply_tuning
from tests.parts.tiny_parts import LANGUAGE_MODELS, SCALED_LOGITS, make_tokenizer

Folder = Callable[[str], str]


@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS, *SCALED_LOGITS])
def test_without_an_image_the_logits_are_those_of_the_language_model(
    kind: str, language_model: Folder, tower: Folder
) -> None:
    folder = language_model(kind)
    model, processor = build_model(ModelConfig(language_model=folder, vision_tower=tower("clip_vision_model")))
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = processor.encode_question("What is written on the sign? " * 3, image=False)
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, stock(input_ids=ids).logits
    assert ids.shape[1] > 16  # longer than the sliding windows
    assert torch.allclose(ours[..., : theirs.shape[-1]], theirs, atol=1e-5)
    assert model.config.tie_word_embeddings == stock.config.tie_word_embeddings
    assert (processor.template, processor.image_token) == ("chat", "<image>")
    rows = model.get_input_embeddings().weight
    spare = kind in ("qwen2", "qwen3", "phi3")
    assert rows.shape[0] == stock.config.vocab_size + (not spare)
    if not spare:
        assert torch.allclose(rows[-1], rows[:-1].mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS, *SCALED_LOGITS])
def test_a_packed_row_has_the_loss_and_gradients_of_its_conversations(
    kind: str, language_model: Folder, tower: Folder
) -> None:
    parts = ModelConfig(language_model=language_model(kind), vision_tower=tower("siglip_vision_model"))
    model, processor = build_model(parts)
    assert enable_packing(model)  # also of Gemma 2, whose soft-capped scores SDPA cannot compute
    rows = [processor.encode_question(text)[0] for text in ("What is written on the sign? " * 2, "The total?")]
    pixels = torch.randn(2, 3, 56, 56)
    lengths = tuple(len(row) for row in rows)
    assert max(lengths) > 16
    packed = torch.cat(rows)[None]
    targets = torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in rows])[None]
    arguments = packed_arguments(lengths, model, torch.device("cpu"))
    loss = model(input_ids=packed, pixel_values=pixels, targets=targets, **arguments).loss
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    alone = sum(
        model(
            input_ids=row[None], pixel_values=pixels[i : i + 1], targets=torch.tensor([[*row[1:].tolist(), -100]])
        ).loss
        for i, row in enumerate(rows)
    )
    alone.backward()  # type: ignore[union-attr]
    assert float(loss.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)  # type: ignore[union-attr]
    largest = max(float(one.abs().max()) for one in gradients.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-6 * largest, rtol=1e-4), name


def test_the_loss_of_capped_logits_is_that_of_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (7,))
    found = torch.autograd.grad(summed_cross_entropy(hidden, weight, targets, chunk=3, softcap=2.0), (hidden, weight))
    capped = 2.0 * torch.tanh(hidden @ weight.T / 2.0)
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(capped, targets, reduction="sum"), (hidden, weight)
    )
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


def test_adapters_are_added_to_all_linear_layers_of_the_decoder(language_model: Folder, tower: Folder) -> None:
    model, _ = build_model(ModelConfig(language_model=language_model("phi3"), vision_tower=tower("dinov2")))
    assert find_linear_layers(model.model.language_model) == {
        "self_attn": ("o_proj", "qkv_proj"),
        "mlp": ("gate_up_proj", "down_proj"),
    }
    wrapped = apply_tuning(model, Lora(rank=2, alpha=4, target="attention"))
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in wrapped.named_parameters() if "lora_A" in name
    }
    assert adapted == {"o_proj", "qkv_proj"}
    assert not any("vision_tower" in name for name, one in wrapped.named_parameters() if one.requires_grad)


def test_a_layer_that_the_language_model_does_not_have_is_named(language_model: Folder, tower: Folder) -> None:
    model, _ = build_model(ModelConfig(language_model=language_model("phi3"), vision_tower=tower("dinov2")))
    with pytest.raises(ConfigError, match=r"got q_proj, expected some of .*qkv_proj"):
        apply_tuning(model, Lora(rank=2, alpha=4, target=("q_proj",)))


def test_a_model_with_an_encoder_is_named(tower: Folder, tmp_path: Path) -> None:
    AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="encoder and a decoder"):
        build_model(ModelConfig(language_model=str(tmp_path), vision_tower=tower("dinov2")))


@pytest.mark.parametrize(("kind", "scale"), [("hyperclovax", 0.5), ("granite", 0.0)])
def test_scaled_logits_that_are_not_known_are_named(kind: str, scale: float, tower: Folder, tmp_path: Path) -> None:
    AutoConfig.for_model(kind, logits_scaling=scale).save_pretrained(tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"logits_scaling: how '{kind}' scales its logits is not known"):
        build_model(ModelConfig(language_model=str(tmp_path), vision_tower=tower("dinov2")))


def test_a_kind_that_transformers_cannot_continue_a_text_with_is_named(tower: Folder, tmp_path: Path) -> None:
    AutoConfig.for_model("clip_text_model").save_pretrained(tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not a language model"):
        build_model(ModelConfig(language_model=str(tmp_path), vision_tower=tower("dinov2")))


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_named(
    language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(language_model("olmo2"))
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="too few rows for the tokenizer"):
        build_model(ModelConfig(language_model=str(tmp_path), vision_tower=tower("dinov2")))


def test_a_tokenizer_without_a_chat_template_needs_another_template(
    language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(language_model("olmo2")).save_pretrained(tmp_path)
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="brings no chat template"):
        build_model(ModelConfig(language_model=str(tmp_path), vision_tower=tower("dinov2")))
