"""LLaVA-1.5: its stock and its original layout are read, and its conversations have the stock processor's ids."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llavar_peft import Full, ModelConfig, build_model, export
from llavar_peft.constants import IGNORE_INDEX, VICUNA_SYSTEM_PROMPT
from llavar_peft.data.encode_record import encode_record
from llavar_peft.errors import ConfigError
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.preflight.estimate_counts import count_parameters
from llavar_peft.weights.io import tensor_names
from tests.parts.tiny_parts import save_tower

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
WORDS = ("What", "is", "the total?", "12.50", "naïve café", "日本", "\n", "  ", "🙂", "a-b_c", "</s>", "USER:")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of ``llava-hf/llava-1.5-7b-hf``, and other sizes."""
    folder = tmp_path_factory.mktemp("llava-1.5")
    tokenizer = load_tokenizer(GOLDEN / "small")
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in ("<image>", "<pad>")],
        special_tokens=True,
    )
    tokenizer.pad_token = "<pad>"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer) + 6, max_position_embeddings=256),
        vision_config=CLIPVisionConfig(**sizes, image_size=56, patch_size=14),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_stock_layout_gives_the_logits_of_stock_transformers(stock: Path, tmp_path: Path) -> None:
    theirs = LlavaForConditionalGeneration.from_pretrained(stock, dtype="float32").eval()
    ours, processor = build_model(ModelConfig(checkpoint=str(stock), dtype="float32"))
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    text = f"{VICUNA_SYSTEM_PROMPT} USER: <image>\nWhat is written? ASSISTANT:"
    expected = LlavaProcessor.from_pretrained(stock)(images=[image], text=[text], return_tensors="pt")
    got = processor(images=image, text=text, return_tensors="pt")
    assert (processor.template, processor.image_token, processor.image_mode) == ("vicuna_v1", "<image>", "square")
    assert torch.allclose(got["pixel_values"], expected["pixel_values"], atol=1e-6)
    ids = processor.encode_question("What is written?")
    bos = torch.tensor([[processor.tokenizer.bos_token_id]])
    assert torch.equal(ids, torch.cat([bos, expected["input_ids"]], dim=1))
    with torch.no_grad():
        logits = theirs(input_ids=ids, pixel_values=expected["pixel_values"]).logits
        assert torch.allclose(ours(input_ids=ids, pixel_values=got["pixel_values"]).logits, logits, atol=1e-5)

    estimated = config_without_weights(ModelConfig(checkpoint=str(stock)))
    assert count_parameters(estimated, Full()).whole == ours.num_parameters()
    assert estimated.image_token_index == ours.config.image_token_index

    export(stock, tmp_path / "again", to="hf-llava")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again", dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, pixel_values=got["pixel_values"]).logits, logits)


def test_conversations_have_the_ids_of_the_stock_processor(stock: Path) -> None:
    _, processor = build_model(ModelConfig(checkpoint=str(stock), dtype="float32"))
    theirs = LlavaProcessor.from_pretrained(stock)
    draw = random.Random(1)
    image = Image.new("RGB", (56, 56))
    for _ in range(20):
        words = [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))).strip() or "a" for _ in range(4)]
        words = [word.replace("</s>", "") or "a" for word in words]  # a stock processor takes it for the token
        turns = [
            {"from": ("human", "gpt")[number % 2], "value": word if number else f"<image>\n{word}"}
            for number, word in enumerate(words)
        ]
        example = encode_record({"id": "1", "image": "a.png", "conversations": turns}, processor, 4096)
        asked, answer, more, last = (words[0].strip(), *words[1:])
        text = (
            f"<s>{VICUNA_SYSTEM_PROMPT} USER: <image>\n{asked} ASSISTANT: {answer}</s>"
            f"USER: {more} ASSISTANT: {last}</s>"
        )
        expected = theirs(images=[image], text=[text], return_tensors="pt")["input_ids"][0]
        assert example.input_ids.tolist() == expected.tolist()
        supervised = example.input_ids[example.labels != IGNORE_INDEX]
        assert processor.tokenizer.decode(supervised).count("</s>") == 2


def _save_original(stock: Path, folder: Path) -> None:
    """Write the layout of ``liuhaotian/llava-v1.5-7b``: flat settings, no tower, no row for the image token."""
    model = LlavaForConditionalGeneration.from_pretrained(stock, dtype="float32")
    names = {tensor_names.to_released(name): one for name, one in model.state_dict().items()}
    vocabulary = load_tokenizer(GOLDEN / "small")
    tensors = {
        name: (one[: len(vocabulary)] if name in (tensor_names.RELEASED_EMBEDDINGS, tensor_names.HEAD) else one).clone()
        for name, one in names.items()
        if name is not None
    }
    assert "model.mm_projector.0.weight" in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_dict()
    settings = {
        **{key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                      "max_position_embeddings", "rms_norm_eps")},
        "model_type": "llava", "vocab_size": len(vocabulary), "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_vision_select_layer": -2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    vocabulary.save_pretrained(folder)


def test_the_original_layout_gives_the_logits_of_the_stock_one(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    _save_original(stock, tmp_path / "original")
    save_tower("clip_vision_model", tmp_path / "tower")
    # The same tower as in the stock checkpoint.
    tower = LlavaForConditionalGeneration.from_pretrained(stock, dtype="float32").model.vision_tower
    tower.save_pretrained(tmp_path / "tower")
    theirs, _ = build_model(ModelConfig(checkpoint=str(stock), dtype="float32"))
    ours, processor = build_model(
        ModelConfig(checkpoint=str(tmp_path / "original"), vision_tower=str(tmp_path / "tower"), dtype="float32")
    )
    assert (processor.template, processor.image_token, processor.inference_image_mode) == (
        "vicuna_v1", "<image>", "pad",
    )  # fmt: skip
    ids = processor.encode_question("What is written?")
    pixels = torch.randn(1, 3, 56, 56)
    rows = len(processor.tokenizer) - 1
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits[..., :rows]
        assert torch.allclose(ours(input_ids=ids, pixel_values=pixels).logits[..., :rows], expected, atol=1e-5)


def test_a_vicuna_keeps_its_ids_in_the_template_of_llava_1_5(tmp_path: Path) -> None:
    """LLaMA's ``tokenizer.model`` is read as the original's code reads it, whatever the template is."""
    folder = tmp_path / "vicuna"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vocabulary = load_tokenizer(GOLDEN / "small")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(vocabulary))).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((GOLDEN / "small" / "tokenizer.model").read_bytes())
    tower = str(save_tower("clip_vision_model", tmp_path / "tower"))
    _, processor = build_model(ModelConfig(language_model=str(folder), vision_tower=tower, template="vicuna_v1"))
    assert (processor.template, processor.image_token) == ("vicuna_v1", "<image>")
    text = "  two  spaces,\n日本 and a sign. "
    known = vocabulary(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == known


def test_a_tower_that_keeps_its_class_token_is_named(stock: Path, tmp_path: Path) -> None:
    for file in stock.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "full"}))
    with pytest.raises(ConfigError, match="vision_feature_select_strategy: image features with CLIP's class token"):
        build_model(ModelConfig(checkpoint=str(tmp_path)))
