"""Small models in the released layout, with values like those of real ones: fp16, of different sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WIDTH, INNER, LAYERS, WORDS = 48, 96, 3, 500
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": WORDS,
}  # fmt: skip
LLAVA = {
    **LLAMA, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "vocab_size": WORDS + 3,
    "mm_hidden_size": 32, "mm_use_im_start_end": True, "mm_vision_select_layer": -2, "use_mm_proj": True,
    "mm_vision_tower": "clip", "sep_image_conv_front": False,
}  # fmt: skip


def draw_llama(seed: int, *, layers: int = LAYERS, width: int = WIDTH, words: int = WORDS) -> dict[str, Tensor]:
    """Return random fp16 weights by LLaMA's names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).half()

    tensors = {"model.embed_tokens.weight": draw(words, width)}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = draw(width, width)
        for name, shape in (("gate_proj", (INNER, width)), ("up_proj", (INNER, width)), ("down_proj", (width, INNER))):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = (1 + draw(width).float()).half()
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(6, generator=generator)
    tensors["model.norm.weight"] = (1 + draw(width).float()).half()
    tensors["lm_head.weight"] = draw(words, width)
    return tensors


def finetune(tensors: Mapping[str, Tensor], seed: int, *, by: float = 2e-3) -> dict[str, Tensor]:
    """Return a model of the same shape after some training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if "inv_freq" in name
        else (tensor.float() + torch.randn(tensor.shape, generator=generator) * by).half()
        for name, tensor in tensors.items()
    }


def make_llava(llama: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a finetuned model with what LLaVA adds: a projector and three rows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = finetune(llama, seed)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = (torch.randn(3, llama[name].shape[1], generator=generator) * 0.02).half()
        tensors[name] = torch.cat([tensors[name], more])
    tensors["model.mm_projector.weight"] = (torch.randn(WIDTH, 32, generator=generator) * 0.1).half()
    tensors["model.mm_projector.bias"] = torch.zeros(WIDTH, dtype=torch.float16)
    return tensors


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, shards: int = 2) -> Path:
    """Write a folder as transformers 4.28 did: `.bin` shards and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    names = list(tensors)
    where = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        torch.save({name: tensors[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(scope="session")
def llama() -> dict[str, Tensor]:
    return draw_llama(1)


@pytest.fixture(scope="session")
def llava(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    return make_llava(finetune(llama, 2), 3)


@pytest.fixture
def base(tmp_path: Path, llama: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path / "llama", llama, LLAMA)


@pytest.fixture
def target(tmp_path: Path, llava: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path / "llava", llava, LLAVA)
