"""The flat layout of LLaVA's code with other language models, BakLLaVA's first, and what is rejected in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from llavar_peft import ModelConfig, build_model, export
from llavar_peft.constants import VICUNA_SYSTEM_PROMPT
from llavar_peft.errors import ConfigError
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.parts.tiny_parts import make_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization" / "small"
Folder = Callable[[str], str]
LLAVA = {
    "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False, "use_mm_proj": True,
}  # fmt: skip
"""What LLaVA's code adds to the settings of the language model. Source: SkunkworksAI/BakLLaVA-1, config.json."""


@pytest.fixture(scope="module")
def stock(language_model: Folder, tower: Folder) -> Callable[[str], LlavaForConditionalGeneration]:
    """Return a function from a kind of language model to a stock LLaVA with it."""

    def make(kind: str) -> LlavaForConditionalGeneration:
        text = AutoModelForCausalLM.from_pretrained(language_model(kind), dtype="float32")
        vision = CLIPVisionModel.from_pretrained(tower("clip_vision_model"), dtype="float32")
        torch.manual_seed(5)
        made = LlavaForConditionalGeneration(LlavaConfig(text_config=text.config, vision_config=vision.config)).eval()
        made.model.language_model.load_state_dict(text.model.state_dict())
        made.lm_head.load_state_dict(text.lm_head.state_dict())
        made.model.vision_tower.load_state_dict(vision.state_dict())
        return made

    return make


def _save_flat(model: LlavaForConditionalGeneration, folder: Path, kind: str, **changes: Any) -> Path:
    """Write a model as LLaVA's code does, with the settings of its language model as transformers 4 wrote them."""
    folder.mkdir(parents=True)
    state = model.state_dict()
    if model.config.text_config.tie_word_embeddings:
        state.pop(tensor_names.HEAD)
    tensors = {new: one.clone() for name, one in state.items() if (new := tensor_names.to_released(name)) is not None}
    assert {name for name in tensors if "mm_projector" in name} == {
        f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    settings = {**text, **LLAVA, "rope_theta": rope["rope_theta"], "rope_scaling": None, **changes}
    settings.update({"model_type": f"llava_{kind}", "architectures": [f"Llava{kind.title()}ForCausalLM"], **changes})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _inputs(processor: Any) -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": processor.encode_question("What is written?"), "pixel_values": pixels}


@pytest.mark.parametrize("model_type", ["llava_mistral", "llava"])
def test_bakllava_gives_the_logits_of_stock_transformers(
    model_type: str, stock: Callable[[str], LlavaForConditionalGeneration], tower: Folder, tmp_path: Path
) -> None:
    """With LLaMA's kind of tokenizer, as BakLLaVA has; some checkpoints name Mistral in their architecture only."""
    model = stock("mistral")
    vocabulary = load_tokenizer(GOLDEN)
    model.resize_token_embeddings(len(vocabulary))
    folder = _save_flat(model, tmp_path / "bakllava", "mistral", model_type=model_type)
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    ours, processor = build_model(
        ModelConfig(checkpoint=str(folder), vision_tower=tower("clip_vision_model"), dtype="float32")
    )
    assert (processor.template, processor.image_token, processor.image_mode) == ("vicuna_v1", "<image>", "pad")
    assert ours.config.text_config.sliding_window == 16
    model.config.image_token_id = model.config.image_token_index = len(vocabulary)
    model.resize_token_embeddings(len(vocabulary) + 1)
    inputs = _inputs(processor)
    text = f"{VICUNA_SYSTEM_PROMPT} USER: "
    known = vocabulary(f"<s>{text}", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"][0, : len(known)].tolist() == known
    assert inputs["input_ids"].shape[1] > 16  # longer than the sliding window
    with torch.no_grad():
        expected, got = model(**inputs).logits, ours(**inputs).logits
    assert torch.allclose(got[..., :-1], expected[..., :-1], atol=1e-5)

    export(folder, tmp_path / "stock", to="hf-llava", vision_tower=tower("clip_vision_model"))
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, got)
    tokenizer = GOLDEN if model_type == "llava" else None
    export(tmp_path / "stock", tmp_path / "again", to="original", dtype="float32", tokenizer=tokenizer)
    original, again = open_weights(folder), open_weights(tmp_path / "again")
    assert set(original) == set(again)
    assert all(torch.equal(tensor, again[name]) for name, tensor in original.items())
    parts = ModelConfig(checkpoint=str(tmp_path / "again"), vision_tower=tower("clip_vision_model"), dtype="float32")
    with torch.no_grad():
        assert torch.equal(build_model(parts)[0](**inputs).logits[..., :-1], got[..., :-1])


def test_a_flat_qwen_with_the_features_of_llava_1_5_is_read(
    stock: Callable[[str], LlavaForConditionalGeneration], tower: Folder, tmp_path: Path
) -> None:
    """As ``llava_qwen`` of LLaVA-NeXT, with a tied head and spare rows, one of which the image token takes."""
    model = stock("qwen2")
    folder = _save_flat(model, tmp_path / "qwen", "qwen", mm_patch_merge_type="flat")
    make_tokenizer("chatml").save_pretrained(folder)
    ours, processor = build_model(
        ModelConfig(checkpoint=str(folder), vision_tower=tower("clip_vision_model"), dtype="float32")
    )
    assert (processor.template, ours.config.tie_word_embeddings) == ("chat", True)
    model.config.image_token_id = model.config.image_token_index = processor.image_token_id
    inputs = _inputs(processor)
    with torch.no_grad():
        assert torch.allclose(ours(**inputs).logits, model(**inputs).logits, atol=1e-5)


REJECTED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type: not supported .*expected both anyres and spatial_unpad"),
    ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio: not supported .got 'anyres_max_9', expected pad"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
    ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type: not supported .got 'mlp3x_gelu', expected linear"),
    ({"mm_projector_type": "identity"}, "mm_projector_type"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
    ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type"),
    ({"mm_vision_tower": ["a", "b"]}, "mm_vision_tower: several"),
    ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer: several"),
    ({"s2": True}, "s2: not supported"),
    ({"model_type": "llava_frobnicate"}, "a language model that transformers does not have .got 'frobnicate'"),
    ({"model_type": "llava_t5"}, "a language model that transformers does not have .got 't5'"),
    ({"mm_template": "x"}, "mm_template: unknown"),
    ({}, "brings no chat template"),
)


@pytest.mark.parametrize(("changes", "words"), REJECTED)
def test_what_llava_1_5_does_not_have_is_named(
    changes: dict[str, Any], words: str, tower: Folder, tmp_path: Path
) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    settings = {**text, "vocab_size": 320, **LLAVA, "model_type": "llava_qwen2", **changes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words) as error:
        build_model(ModelConfig(checkpoint=str(tmp_path), vision_tower=tower("clip_vision_model")))
    assert "Fix:" in str(error.value)
    assert "Traceback" not in str(error.value)
