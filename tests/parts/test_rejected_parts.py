"""Models that cannot be a part: each is named for what it is, with a fix, and before any weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, Siglip2ImageProcessorPil, SiglipImageProcessorPil

from llavar_peft import ModelConfig, build_model, export
from llavar_peft.errors import ConfigError
from tests.parts.tiny_parts import make_tokenizer, save_language_model

Folder = Callable[[str], str]
LANGUAGE_MODELS: tuple[tuple[str, str], ...] = (
    ("t5", "a model with an encoder and a decoder .got 't5', expected a decoder"),
    ("bart", "a model with an encoder and a decoder"),
    ("whisper", "a model with an encoder and a decoder"),
    ("bert", "not a language model that transformers can continue a text with"),
    ("vit", "not a language model that transformers can continue a text with"),
    ("qwen2_vl", "a complete vision-language model .got 'qwen2_vl'.*Fix: give the folder of the language model"),
    ("gemma3", "a complete vision-language model .got 'gemma3'"),
    ("llava", "a complete vision-language model .got 'llava'.*Fix: set checkpoint instead"),
    ("llava_next", "a complete vision-language model .*Fix: give the folder of the language model"),
    ("clip", "is a vision tower .got 'clip'.*Fix: set vision_tower to it"),
    ("siglip", "is a vision tower"),
    ("ctrl", "a decoder whose embeddings are not found .got 'ctrl'"),
    ("cpmant", "a decoder that takes token ids only, and no image features .got 'cpmant'"),
    ("rwkv", "a decoder whose memory of a text is no cache of transformers .got 'rwkv'"),
    ("llama4_text", "transformers has no decoder without a head for this language model .got 'llama4_text'"),
    ("hrm_text", "a decoder without a list of layers .got HrmTextModel"),
    ("moshi", "embeddings of 32001 rows for a vocabulary of 32000 are not supported .got 'moshi'"),
    ("dory", "its logits are not computed by a head alone .got 'dory'"),
)
TOWERS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("swin", {}, "the resolution changes between its layers .got 'swin', with depths"),
    ("swinv2", {}, "the resolution changes between its layers"),
    ("convnext", {}, "the resolution changes between its layers .got 'convnext'"),
    ("pvt", {}, "the resolution changes between its layers"),
    (
        "siglip2_vision_model",
        {},
        "resolution varies with the image .*NaFlex.*Fix: use a SigLIP 2 with a fixed",
    ),
    ("siglip2", {}, "NaFlex"),
    ("llama", {}, "a language model, expected a vision tower .got 'llama'.*Fix: set language_model to it"),
    ("qwen2", {}, "a language model, expected a vision tower"),
    ("bert", {}, "a language model, expected a vision tower|not a vision transformer"),
    ("t5", {}, "not a vision transformer"),
    ("resnet", {}, "the resolution changes between its layers|not a vision transformer"),
)


def _write(kind: str, folder: Path) -> Path:
    AutoConfig.for_model(kind).save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    return folder


def _said(parts: ModelConfig) -> str:
    with pytest.raises(ConfigError) as error:
        build_model(parts)
    said = str(error.value)
    assert "Fix:" in said
    assert "cannot be read" not in said  # not the message of a damaged file
    assert len(said) < 600
    return said


@pytest.mark.parametrize(("kind", "words"), LANGUAGE_MODELS)
def test_a_language_model_of_another_kind_is_named(kind: str, words: str, tower: Folder, tmp_path: Path) -> None:
    folder = _write(kind, tmp_path)
    assert re.search(words, _said(ModelConfig(language_model=str(folder), vision_tower=tower("dinov2"))))


@pytest.mark.parametrize(("kind", "changes", "words"), TOWERS)
def test_a_tower_of_another_kind_is_named(
    kind: str, changes: dict[str, Any], words: str, language_model: Folder, tmp_path: Path
) -> None:
    folder = _write(kind, tmp_path)
    images: Any = Siglip2ImageProcessorPil() if kind.startswith("siglip2") else SiglipImageProcessorPil()
    images.save_pretrained(folder)
    assert re.search(words, _said(ModelConfig(language_model=language_model("qwen2"), vision_tower=str(folder))))


@pytest.mark.parametrize("stated", ["frobnicate", None, 3, "x" * 5000])
@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_an_unknown_architecture_is_named(
    part: str, stated: object, language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": stated, "hidden_size": 8}))
    parts = {"language_model": language_model("qwen2"), "vision_tower": tower("dinov2"), part: str(tmp_path)}
    assert re.search(r"model_type: not an architecture of transformers \d", _said(ModelConfig(**parts)))


def test_a_siglip_2_of_fixed_resolution_is_a_siglip(language_model: Folder, tmp_path: Path) -> None:
    """Its checkpoints name ``siglip``, have Gemma's tokenizer, and settings of the towers that differ from defaults."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    vision = {**sizes, "image_size": 70, "patch_size": 14, "model_type": "siglip_vision_model"}
    text = {**sizes, "num_hidden_layers": 1, "vocab_size": 256, "model_type": "siglip_text_model"}
    torch.manual_seed(0)
    stock = AutoModel.from_config(AutoConfig.for_model("siglip", vision_config=vision, text_config=text)).eval()
    stock.save_pretrained(tmp_path)
    settings = {"architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip"}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "text_config": text, "vision_config": vision}))
    images = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 2,
        "rescale_factor": 1 / 255, "size": {"height": 70, "width": 70},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>"}')
    (tmp_path / "tokenizer.json").write_text("not read")
    model, processor = build_model(ModelConfig(language_model=language_model("qwen2"), vision_tower=str(tmp_path)))
    assert (processor.image_side, processor.num_image_tokens) == (70, 25)
    prepared = processor(images=Image.new("RGB", (90, 60), (255, 255, 255)), image_mode="square", return_tensors="pt")
    assert float(prepared["pixel_values"].max()) == pytest.approx(1.0)
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = stock.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(model.model.get_image_features(pixels).last_hidden_state, expected)


def test_a_tokenizer_without_a_first_token(tower: Folder, tmp_path: Path) -> None:
    """As Qwen's: no text begins with a special token, in training, inference and the export."""
    folder = save_language_model("qwen2", tmp_path / "qwen")
    tokenizer = make_tokenizer("chatml")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    for template in ("chat", "vicuna_v1"):
        parts = ModelConfig(
            language_model=str(folder),
            vision_tower=tower("clip_vision_model"),
            template=template,
            dtype="float32",  # type: ignore[arg-type]
        )
        model, processor = build_model(parts)
        assert processor.tokenizer.bos_token is None
        out = tmp_path / template
        model.save_pretrained(out)
        processor.save_pretrained(out)
        export(out, tmp_path / f"{template}-stock", to="hf-llava")
        theirs = AutoProcessor.from_pretrained(tmp_path / f"{template}-stock")
        image = Image.new("RGB", (56, 56))
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert "None" not in prompt
        ids = processor.encode_question("What?")
        stock = theirs(images=[image], text=[prompt], return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert torch.equal(stock, ids)
        plain = processor(text="What? <image>", images=image, return_tensors="pt")["input_ids"]
        first = tokenizer("What?", add_special_tokens=False)["input_ids"]
        assert plain[0, : len(first)].tolist() == first
        with torch.no_grad():
            assert model.generate(input_ids=ids, pixel_values=torch.zeros(1, 3, 56, 56), max_new_tokens=2).shape[1] > 0
