"""Tiny models that read tiles, as stock transformers saves LLaVA-NeXT, and images of many shapes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    SiglipVisionConfig,
)

from llavar_peft import CrossAttention, ModelConfig, Tiles, build_model
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Tune
from llavar_peft.training.save_weights import save_trained
from tests.parts.tiny_parts import save_tower

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
SIDE, PATCH = 56, 14
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
"""The grids of ``llava-hf/llava-v1.6-*``, for a smaller tile."""
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_llava_next(
    folder: Path, *, tower: str = "clip_vision_model", template: str | None = None, adds_bos: bool = False
) -> Path:
    """Save a model with the files and names of ``llava-hf/llava-v1.6-vicuna-7b-hf``, and return the folder.

    Args:
        folder: Folder to create.
        tower: Kind of the vision tower.
        template: The processor's chat template.
        adds_bos: Whether the tokenizer adds ``<s>`` to every text, as those of LLaMA and Mistral do.
    """
    tokenizer = load_tokenizer(GOLDEN / "small")
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in ("<image>", "<pad>")], special_tokens=True
    )
    tokenizer.pad_token = "<pad>"
    if adds_bos:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    clip = tower == "clip_vision_model"
    sizes = {**_SIZES, "image_size": SIDE, "patch_size": PATCH}
    strategy = "default" if clip else "full"
    config = LlavaNextConfig(
        text_config=LlamaConfig(**_SIZES, vocab_size=len(tokenizer) + 6, max_position_embeddings=1024),
        vision_config=CLIPVisionConfig(**sizes) if clip else SiglipVisionConfig(**sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that differences show in the logits
    model.save_pretrained(folder)
    # The names on the hub, which transformers 5 still reads.
    tensors = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    LlavaNextProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, width: int = 32) -> Path:
    """Save a tiny Vicuna with the golden tokenizer, and return the folder."""
    sizes = {**_SIZES, "hidden_size": width}
    tokenizer = load_tokenizer(GOLDEN / "small")
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=1024)).save_pretrained(
        folder
    )
    (folder / "tokenizer.model").write_bytes((GOLDEN / "small" / "tokenizer.model").read_bytes())
    return folder


def image_processor() -> LlavaNextImageProcessorPil:
    """Return the image processor of the hub's models, for the smaller tile."""
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )


def open_stock(folder: Path) -> tuple[Any, Any]:
    """Return stock transformers' model and processor, which have all of their weights from the folder."""
    model, loading = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval(), LlavaNextProcessor.from_pretrained(folder)


def draw_image(width: int, height: int) -> Image.Image:
    """Return an image of noise; the same for the same size."""
    noise = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def as_stock(*images: Image.Image) -> list[np.ndarray]:
    """Return images as arrays ``[3, H, W]``: stock transformers mistakes a height of 1 or 3 for the channels."""
    return [np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in images]


def stock_inputs(processor: Any, images: list[Image.Image], text: list[str]) -> dict[str, Any]:
    """Return the inputs of a stock model."""
    inputs: dict[str, Any] = processor(
        images=as_stock(*images), text=text, return_tensors="pt", padding=True, input_data_format="channels_first"
    )
    return dict(inputs)


def save_tuned(config: ModelConfig, tune: Tune, folder: Path, *, seed: int = 7) -> Path:
    """Save what a stage would, with everything that it trains moved a little, and return the folder."""
    model, processor = build_model(config)
    trained = apply_tuning(model, tune, new_rows=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    folder.mkdir(parents=True)
    save_trained(trained, processor, folder, state=trained.state_dict(), tune=tune, base=config)
    return folder


@dataclasses.dataclass(frozen=True)
class PlainModel:
    """Folders of a model without a resolution, and of its parts, and the resolution that is added to them."""

    vicuna: Path
    tower: Path
    plain: Path
    resolution: Tiles | CrossAttention

    @property
    def added(self) -> ModelConfig:
        """The saved model with the resolution."""
        return ModelConfig(checkpoint=str(self.plain), resolution=self.resolution, dtype="float32")

    @property
    def parts(self) -> ModelConfig:
        """A model from the parts, with the resolution."""
        parts = {"language_model": str(self.vicuna), "vision_tower": str(self.tower)}
        return ModelConfig(**parts, dtype="float32", resolution=self.resolution)


def save_plain_model(root: Path, resolution: Tiles | CrossAttention) -> PlainModel:
    """Save a model without a resolution, and its parts."""
    made = PlainModel(
        save_llama(root / "vicuna"), save_tower("clip_vision_model", root / "tower"), root / "plain", resolution
    )
    model, processor = build_model(dataclasses.replace(made.parts, resolution=None))
    model.save_pretrained(made.plain)
    processor.save_pretrained(made.plain)
    return made


def logits_of_two_images(model: Any, processor: Any) -> torch.Tensor:
    """Return the logits of a prompt with two images of different shapes."""
    inputs = processor(
        images=[draw_image(300, 80), draw_image(60, 60)],
        text="USER: <image> or <image>? ASSISTANT:",
        return_tensors="pt",
        image_mode="pad",
    )
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits
